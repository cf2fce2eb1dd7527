"""dinoray train: what it leaves, what it does when it is stopped or killed, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import struct
import tarfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
import safetensors
import safetensors.torch
import torch
from file_systems import enlarge, mounted
from s3_server import BUCKET, S3Server
from small_runs import photo
from tensorboardX.proto.event_pb2 import Event
from train_here import (
    MODEL,
    accuracies,
    assert_same_training,
    die_at,
    final_state,
    log_of,
    losses,
    options,
    stop_after,
    tiny,
    train,
    training_here,
)
from typer.testing import CliRunner

from dino_ops.models import create_model
from pipelines.cli import app
from pipelines.errors import JobError, RequestError
from pipelines.settings.loading import load_config
from pipelines.train import job, worker
from pipelines.train.log import TrainingLog
from pipelines.train.setup import make_recipe

WHOLE = ("train.evaluate_epochs=1", "train.checkpoint_steps=4", "run.attempts=1")
STEPS = 12  # two epochs of 25 images in fours


@pytest.fixture(autouse=True)
def here(ray: None) -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four photos with two labels, and one that is none."""
    folder = tmp_path_factory.mktemp("input")
    for number in range(24):
        path = folder / ("cat" if number % 2 else "dog") / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo(number).save(path, quality=92)
    (folder / "cat" / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory, ray: None) -> tuple[Path, job.Result]:
    """OUTPUT of a training that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "output"
    with training_here():
        return output, train(source, output, *WHOLE)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments: object, code: int) -> str:
    """What the command prints; where it fails, its one sentence."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    if code == 0:
        return result.stdout
    assert "Traceback" not in result.stderr and result.stderr.count("dinoray: ") == 1, result.stderr
    line = result.stderr.splitlines()[-1]  # accuracies may come before
    assert line.startswith("dinoray: ")
    return line


# what a training leaves


def test_weights_are_the_teacher_of_the_last_checkpoint_and_load_everywhere(undisturbed: tuple[Path, Any]) -> None:
    output, result = undisturbed
    assert (result.status, result.steps_done, result.weights) == ("done", STEPS, f"{output}/backbone.safetensors")
    written = safetensors.torch.load_file(result.weights)
    with safetensors.safe_open(result.weights, "pt") as file:
        assert file.metadata()["model"] == MODEL and file.metadata()["dinoray_run"] == result.run_id
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000008.pt", "step-00000012.pt"]
    checkpoint = output / "checkpoints" / "step-00000012.pt"
    teacher = torch.load(checkpoint, weights_only=True)["teacher"]
    backbone = {name.removeprefix("backbone.vit."): one for name, one in teacher.items() if "backbone.vit." in name}
    assert backbone.keys() == written.keys()
    for name, tensor in backbone.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)
    ours, theirs = create_model(MODEL, result.weights), create_model(MODEL, checkpoint)
    random = create_model(MODEL, "random")
    for name, tensor in ours.vit.state_dict().items():
        torch.testing.assert_close(tensor, written[name], rtol=0, atol=0)
        torch.testing.assert_close(theirs.vit.state_dict()[name], tensor, rtol=0, atol=0)
    assert any(not torch.equal(one, random.vit.state_dict()[name]) for name, one in written.items())


def test_who_trained_with_other_means_is_told_to_extract_with_them(source: Path, tmp_path: Path) -> None:
    """Else features would silently be of pixels that the network never saw."""
    result = train(source, tmp_path / "output", "train.epochs=1", "image.mean=[0.1,0.2,0.3]")
    assert "--set image.mean=[0.1,0.2,0.3]" in result.use and "image.std" not in result.use
    assert result.use in (tmp_path / "output" / "README.md").read_text()


def test_weights_in_half_precision(source: Path, tmp_path: Path) -> None:
    result = train(source, tmp_path / "output", "train.epochs=1", "train.weights_dtype=float16")
    written = safetensors.torch.load_file(result.weights)
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    teacher = create_model(MODEL, next((tmp_path / "output" / "checkpoints").glob("*.pt"))).vit.state_dict()
    for name, tensor in create_model(MODEL, result.weights).vit.state_dict().items():
        torch.testing.assert_close(tensor, teacher[name], rtol=1e-3, atol=1e-4)


def test_the_log_has_every_step_once_as_duckdb_reads_it(undisturbed: tuple[Path, Any]) -> None:
    output, result = undisturbed
    lines = f"read_json('{output}/log/*.jsonl', format='newline_delimited', union_by_name=true)"
    steps = duckdb.sql(f"select step, epoch, loss from {lines} where loss is not null order by step").fetchall()
    assert [(step, epoch) for step, epoch, _ in steps] == [(at, round(at / 6, 4)) for at in range(1, STEPS + 1)]
    assert steps[-1][2] == result.loss
    found = duckdb.sql(
        f"select step, knn_accuracy from {lines} where knn_accuracy is not null order by step"
    ).fetchall()
    assert [step for step, _ in found] == [0, 6, 12] and all(0 <= accuracy <= 1 for _, accuracy in found)
    assert found[-1][1] == result.knn_accuracy
    ((numbers,),) = duckdb.sql(
        f"select count(*) filter (abs(loss - teacher_entropy - divergence) < 1e-4 and centre_norm >= 0 and "
        f"images_per_second > 0 and momentum between 0.99 and 1 and learning_rate >= 0) from {lines}"
    ).fetchall()
    assert numbers == STEPS


def read_events(content: bytes) -> list[Event]:
    """Records of an event file: length, its checksum, an Event, its checksum (TensorFlow's record format)."""
    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    assert at == len(content)
    return found


def curves(files: list[bytes]) -> dict[tuple[str, int], float]:
    """What TensorBoard shows: a file's start hides all that earlier files say of its step and later ones."""
    shown: dict[tuple[str, int], float] = {}
    for content in files:
        for event in read_events(content):
            if event.HasField("session_log"):
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                shown[value.tag, event.step] = value.simple_value
    return shown


def assert_curves_are_the_log(files: list[bytes], records: list[dict[str, Any]]) -> None:
    expected = {
        (name, record["step"]): value
        for record in records
        for name, value in record.items()
        if name not in ("step", "time")
    }
    shown = curves(files)
    assert shown.keys() == expected.keys()
    for key, value in expected.items():
        assert shown[key] == pytest.approx(value, rel=1e-6), key


def event_files(output: Path) -> list[bytes]:
    files = sorted((output / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return [path.read_bytes() for path in files]


def test_tensorboard_shows_what_the_log_says(undisturbed: tuple[Path, Any]) -> None:
    output, _ = undisturbed
    (content,) = event_files(output)
    assert read_events(content)[0].file_version == "brain.Event:2"
    assert_curves_are_the_log([content], log_of(output))


def test_the_card_says_what_was_trained_on_what_and_how_it_went(undisturbed: tuple[Path, Any], source: Path) -> None:
    output, _ = undisturbed
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert f"25 images of `{source}`" in card and "1 of which could not be read" in card
    assert "From random weights, 2 epochs of 6 steps on 1 CPU worker." in card
    for field in dataclasses.fields(make_recipe(tiny(*WHOLE).train)):
        assert f"| train.{field.name} | " in card or field.name == "multicrop"
    assert "| train.out_dim | 64 |" in card and "| train.global_scale | 0.4, 1.0 |" in card
    of_steps = {line["step"]: line for line in log_of(output) if "loss" in line}
    found = accuracies(output)
    assert f"| 0 | | | {found[0]:.1%} |" in card
    for step in (6, 12):
        line = of_steps[step]
        assert (
            f"| {line['epoch']:.2f} | {line['loss']:.3f} | {line['teacher_entropy']:.3f} | {found[step]:.1%} |" in card
        )
    assert f"{found[0]:.1%} at the beginning, {found[12]:.1%} at the end" in card
    assert f"model.weights={output}/backbone.safetensors" in card


def test_the_report_and_the_unreadable_image(undisturbed: tuple[Path, Any], source: Path) -> None:
    output, _ = undisturbed
    (path,) = (output / "runs").glob("*.json")
    report = json.loads(path.read_text())
    assert (report["command"], report["status"], report["asked"]) == ("train", "done", {"input": str(source)})
    told = report["result"]
    assert (told["images"], told["labelled"], told["steps_done"], told["unreadable"]) == (25, 25, STEPS, 1)
    assert {"plan", "start", "train", "total"} <= told["seconds"].keys()
    (line,) = (output / "unreadable.jsonl").read_text().splitlines()
    bad = json.loads(line)
    assert (bad["image_id"], bad["uri"]) == ("cat/broken.jpg", f"{source}/cat/broken.jpg") and bad["message"]


def test_the_same_command_again_changes_nothing(undisturbed: tuple[Path, Any], source: Path) -> None:
    output, _ = undisturbed
    before = tree(output)
    again = train(source, output, *WHOLE)
    assert (again.status, again.steps_done) == ("unchanged", STEPS)
    said = command("train", source, output, *options(*WHOLE), code=0)
    assert "nothing to do" in said and f"{output}/backbone.safetensors" in said
    assert tree(output) == before


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    said = command("train", source, tmp_path / "output", *options(*WHOLE), "--dry-run", code=0)
    assert "25 images, 2 epochs, 12 steps" in said and "Nothing was written" in said
    assert not (tmp_path / "output").exists()


def test_the_card_is_made_up_for_where_a_training_was_killed_before_it(
    undisturbed: tuple[Path, Any], source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(undisturbed[0], output)
    (output / "README.md").unlink()
    result = train(source, output, *WHOLE)
    assert (result.status, result.steps_done) == ("done", STEPS) and (output / "README.md").exists()
    assert_same_training(output, undisturbed[0], STEPS)
    assert accuracies(output) == accuracies(undisturbed[0])


# stopped, killed, continued


@contextmanager
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def check_continued(source: Path, output: Path, undisturbed: Path, resumed_from: int) -> None:
    result = train(source, output, *WHOLE)
    assert (result.status, result.resumed_from, result.steps_done) == ("done", resumed_from, STEPS)
    assert_same_training(output, undisturbed, STEPS)
    assert accuracies(output) == accuracies(undisturbed)
    assert (output / "unreadable.jsonl").read_text() == (undisturbed / "unreadable.jsonl").read_text()
    assert result.unreadable == 1
    assert_curves_are_the_log(event_files(output), log_of(output))


@pytest.mark.parametrize("steps", [3, 6], ids=["in mid-epoch", "at the end of an epoch"])
def test_a_stopped_training_continues_as_if_nothing_had_been(
    steps: int, undisturbed: tuple[Path, Any], source: Path, tmp_path: Path
) -> None:
    with patched() as patch:
        stop_after(patch, steps)
        stopped = train(source, tmp_path / "output", *WHOLE)
    assert stopped.steps_done == steps and not (tmp_path / "output" / "README.md").exists()
    assert list(losses(tmp_path / "output")) == list(range(1, steps + 1))
    check_continued(source, tmp_path / "output", undisturbed[0], steps)


@pytest.mark.parametrize(
    ("owner", "name", "when", "checkpoint", "seconds"),
    [
        (worker.Worker, "_report", lambda _, step, *__: step == 7, 4, 0.0),
        (worker, "write_checkpoint", lambda _, __, step, *___: step == 8, 4, 20.0),
        (worker, "remove_old", lambda *_: True, 4, 20.0),
        (TrainingLog, "add", lambda _, record: record["step"] == 3, 0, 0.0),
    ],
    ids=["between checkpoints", "before a checkpoint", "after a checkpoint", "before the first checkpoint"],
)
def test_a_killed_training_logs_no_step_twice_and_none_never(
    owner: Any,
    name: str,
    when: Callable[..., bool],
    checkpoint: int,
    seconds: float,
    undisturbed: tuple[Path, Any],
    source: Path,
    tmp_path: Path,
) -> None:
    """seconds: after which the log is written besides; with 0 the file has what came after the checkpoint too."""
    with patched() as patch:
        patch.setattr("pipelines.train.log.WRITE_SECONDS", seconds)
        die_at(patch, owner, name, when)
        with pytest.raises(JobError, match="Killed"):
            train(source, tmp_path / "output", *WHOLE)
    assert not (tmp_path / "output" / "backbone.safetensors").exists()
    check_continued(source, tmp_path / "output", undisturbed[0], checkpoint)


def test_lines_of_several_steps_end_where_they_would_without_a_stop(source: Path, tmp_path: Path) -> None:
    overrides = ("train.log_steps=5", "train.checkpoint_steps=8")
    with patched() as patch:
        stop_after(patch, 8)
        train(source, tmp_path / "output", *overrides)
    train(source, tmp_path / "output", *overrides)
    lines = [line["step"] for line in log_of(tmp_path / "output")]
    assert lines == [5, 6, 8, 10, 12]


def test_images_known_as_unreadable_stay_listed(source: Path, tmp_path: Path) -> None:
    """The broken one comes in the first epoch and is mended before the second."""
    folder = tmp_path / "input"
    shutil.copytree(source, folder)
    broken = folder / "cat" / "broken.jpg"
    times = (broken.stat().st_atime_ns, broken.stat().st_mtime_ns)
    content = (folder / "cat" / "01.jpg").read_bytes()
    broken.write_bytes(b"x" * len(content))
    os.utime(broken, ns=times)
    with patched() as patch:
        stop_after(patch, 6)
        first = train(folder, tmp_path / "output")
    broken.write_bytes(content)  # of the same size and time, so that INPUT is the same
    os.utime(broken, ns=times)
    second = train(folder, tmp_path / "output")
    assert (first.unreadable, second.unreadable) == (1, 1)
    assert len((tmp_path / "output" / "unreadable.jsonl").read_text().splitlines()) == 1
    assert "1 of which could not be read" in (tmp_path / "output" / "README.md").read_text()


def test_a_loss_that_is_no_number_is_a_sentence_and_never_saved(source: Path, tmp_path: Path) -> None:
    wild = ("train.learning_rate=1e30", "train.warmup_epochs=0", "train.clip=0", "train.checkpoint_steps=1")
    output = tmp_path / "output"
    said = command("train", source, output, *options(*wild), code=1)
    assert "no longer a number" in said and "train.learning_rate" in said
    for path in (output / "checkpoints").glob("*.pt"):
        state = final_state(output, int(path.stem.removeprefix("step-")))
        assert all(torch.isfinite(tensor).all() for tensor in state.values()), path
    (report,) = (output / "runs").glob("*.json")
    told = json.loads(report.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["status"] == "failed"


# what is refused


def refused(source: object, output: Path, *overrides: str, code: int = 2) -> str:
    before = tree(output) if output.exists() else None
    said = command("train", source, output, *options(*overrides), code=code)
    assert (tree(output) if output.exists() else None) == before, "something was written"
    return said


def test_fewer_images_than_a_batch(source: Path, tmp_path: Path) -> None:
    said = refused(source, tmp_path / "output", "train.batch_size=32")
    assert "25 images" in said and "32" in said and "train.batch_size of at most 25" in said


@pytest.mark.parametrize(("key", "size", "nearest"), [("global_size", 40, 32), ("local_size", 25, 32)])
def test_crops_that_are_no_whole_patches(key: str, size: int, nearest: int, source: Path, tmp_path: Path) -> None:
    said = refused(source, tmp_path / "output", f"train.{key}={size}")
    assert f"train.{key} is {size} pixels" in said and "16-pixel patches" in said and f"use {nearest}" in said


def test_missing_input(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "absent", tmp_path / "output")


def test_missing_validation(source: Path, tmp_path: Path) -> None:
    said = refused(source, tmp_path / "output", f"train.validation={tmp_path}/absent")
    assert "absent" in said and "does not exist" in said


def test_weights_of_another_architecture_and_none(source: Path, tmp_path: Path) -> None:
    other = create_model("test_vit2", "random")
    safetensors.torch.save_file(other.vit.state_dict(), tmp_path / "other.safetensors")
    said = refused(source, tmp_path / "output", f"model.weights={tmp_path}/other.safetensors")
    assert "other.safetensors" in said and MODEL in said
    said = refused(source, tmp_path / "output", f"model.weights={tmp_path}/absent.pth")
    assert "absent.pth does not exist" in said


def test_a_model_without_class_token(source: Path, tmp_path: Path) -> None:
    said = command("train", source, tmp_path / "output", *options("model.name=test_vit2"), code=2)
    assert "no class token" in said


def test_an_output_that_holds_another_training(
    undisturbed: tuple[Path, Any], source: Path, photos: Callable[..., Path]
) -> None:
    output, _ = undisturbed
    for override, old, new in (
        ("model.name=vit_tiny_patch16_224", MODEL, "vit_tiny_patch16_224"),
        ("train.learning_rate=0.001", "0.0005", "0.001"),
        ("train.local_size=32", "16", "32"),
        ("train.epochs=3", "2", "3"),
    ):
        said = refused(source, output, *WHOLE, override)
        assert f"{override.split('=')[0]} was {old}, now {new}" in said and "another OUTPUT" in said
        assert said.count(" was ") == 1
    assert "INPUT has other images" in refused(photos(25), output, *WHOLE)


def test_a_damaged_checkpoint(undisturbed: tuple[Path, Any], source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(undisturbed[0], output)
    last = output / "checkpoints" / "step-00000012.pt"
    whole = last.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2], whole[:-100]):
        last.write_bytes(content)
        said = refused(source, output, *WHOLE, code=1)
        assert str(last) in said and "damaged" in said and "remove it" in said
    last.unlink()
    (output / "README.md").unlink()
    check_continued(source, output, undisturbed[0], 8)


def test_too_many_unreadable_images_end_the_job_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.jpg").write_bytes(b"no image")
    with training_here(crops=False):  # the error comes out of an actor
        said = command("train", folder, tmp_path / "output", *options(), code=1)
    assert "21 images in a row cannot be read" in said and "check INPUT" in said
    assert not (tmp_path / "output" / "checkpoints").exists()


def plan(overrides: tuple[str, ...], batch_size: int = 64, **resources: float) -> job.TrainingLayout:
    return job.plan_layout(resources, load_config([], list(overrides)), batch_size)


def test_layouts() -> None:
    gpus = plan((), GPU=2, CPU=8)
    assert (gpus.workers, gpus.device, gpus.cpus, gpus.gpus, gpus.crop_workers, gpus.crop_cpus) == (
        2,
        "cuda",
        1,
        1,
        3,
        1,
    )
    assert plan((), GPU=1, CPU=1).crop_cpus == 0
    halves = plan(("run.gpus_per_worker=0.5",), GPU=1, CPU=8)
    assert (halves.workers, halves.gpus) == (2, 0.5)
    assert plan(("model.device=cpu",), GPU=2, CPU=8).device == "cpu"
    for cpus in (1, 2, 4):
        one = plan(("run.cpus_per_worker=1", f"run.workers={cpus}"), CPU=cpus)
        assert (one.workers, one.device, one.gpus, one.crop_cpus) == (cpus, "cpu", 0, 0) and one.crop_workers == 1
    with pytest.raises(RequestError, match=r"batch_size is 64, which 3 workers cannot share evenly: use 63"):
        plan(("run.workers=3", "run.cpus_per_worker=1"), CPU=4)
    with pytest.raises(RequestError, match="cluster has no GPU"):
        plan(("model.device=cuda",), CPU=4)
    with pytest.raises(RequestError, match="3 workers with 1 CPU and 1 GPU each were asked for"):
        plan(("run.workers=3",), GPU=2, CPU=8)
    with pytest.raises(RequestError, match=r"lower run\.workers"):
        plan(("run.workers=9", "run.cpus_per_worker=1"), CPU=8)


def test_a_batch_that_workers_cannot_share(source: Path, tmp_path: Path) -> None:
    said = command("train", source, tmp_path / "output", *options("run.workers=3", "run.cpus_per_worker=1"), code=2)
    assert "train.batch_size is 4, which 3 workers cannot share evenly: use 3" in said
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["runs"]


# storage


def test_a_full_disk_leaves_the_earlier_checkpoint_and_the_same_command_continues(
    undisturbed: tuple[Path, Any], source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "disk" / "output"
    with mounted(tmp_path / "disk", "size=9m"):
        said = command("train", source, output, *options(*WHOLE), code=1)
        assert "After step 8 the checkpoint could not be written" in said and "no space left" in said
        assert "the last whole checkpoint is of step 4" in said and "Make room" in said
        assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000004.pt"]
        assert not list(output.rglob("*.partial")) and not (output / "backbone.safetensors").exists()
        enlarge(tmp_path / "disk")
        check_continued(source, output, undisturbed[0], 4)


def test_a_disk_that_was_full_from_the_beginning(source: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k"):
        (tmp_path / "disk" / "other").write_bytes(b"x" * 56 * 1024)
        said = command("train", source, tmp_path / "disk" / "output", *options(*WHOLE), code=1)
        assert "no space left" in said or "full" in said


def tar_of(folder: Path, archive: Path) -> None:
    """A WebDataset shard: pictures with .cls beside them."""
    with tarfile.open(archive, "w") as tar:
        for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
            label = str(int(path.parent.name == "cat")).encode()
            for name, data in ((f"{number:03d}.jpg", path.read_bytes()), (f"{number:03d}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_webdataset_shards_and_a_validation_folder(source: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    tar_of(source, shards / "000.tar")
    for number in range(6):
        path = tmp_path / "validation" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(100 + number).save(path)
    result = train(shards, tmp_path / "output", f"train.validation={tmp_path}/validation", "train.evaluate_epochs=2")
    assert (result.images, result.labelled, result.unreadable) == (25, 25, 1)
    found = accuracies(tmp_path / "output")
    assert list(found) == [0, STEPS] and all(
        (6 * one) == pytest.approx(round(6 * one), abs=1e-4) for one in found.values()
    )
    assert f"the images of `{tmp_path}/validation`" in (tmp_path / "output" / "README.md").read_text()


def test_without_labels_there_is_no_accuracy_and_it_says_so(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    for path in source.rglob("*.jpg"):
        shutil.copy(path, folder)
    result = train(folder, tmp_path / "output", "train.evaluate_epochs=1", "train.epochs=1")
    assert result.knn_accuracy is None and any(said.startswith("No k-NN accuracy") for said in result.messages)
    assert accuracies(tmp_path / "output") == {}
    assert "k-NN accuracy:" not in (tmp_path / "output" / "README.md").read_text()


def test_a_bucket(s3: S3Server, undisturbed: tuple[Path, Any], source: Path, tmp_path: Path) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**s3.options, use_listings_cache=False)
    place = f"{BUCKET}/{uuid.uuid4().hex[:12]}"
    given = tuple(f"storage.options.{key}={value}" for key, value in s3.options.items())
    with patched() as patch:
        stop_after(patch, 3)
        stopped = train(source, f"s3://{place}", *WHOLE, *given)
    assert stopped.steps_done == 3
    assert train(source, f"s3://{place}", *WHOLE, *given).resumed_from == 3
    assert train(source, f"s3://{place}", *WHOLE, *given).status == "unchanged"
    fs.get(place, str(tmp_path / "output"), recursive=True)
    output = tmp_path / "output"
    assert_same_training(output, undisturbed[0], STEPS)
    assert accuracies(output) == accuracies(undisturbed[0])
    assert safetensors.torch.load_file(output / "backbone.safetensors").keys()
    assert len(list((output / "runs").glob("*.json"))) == 2 and (output / "README.md").exists()
    files = sorted((output / "tensorboard").iterdir())  # their names begin with the time
    assert len(files) == 2
    assert_curves_are_the_log([path.read_bytes() for path in files], log_of(output))
    for path in output.rglob("*"):
        assert not path.is_file() or s3.options["secret"].encode() not in path.read_bytes()


# where it starts


@pytest.mark.parametrize("given", [True, False])
def test_training_starts_from_the_weights_that_are_given_or_from_random_ones(
    given: bool, source: Path, tmp_path: Path
) -> None:
    """At a rate of nearly nothing the network stays what it was at the beginning."""
    expected = create_model(MODEL, "random", seed=5 if given else 2)
    start = tmp_path / "start.safetensors"
    safetensors.torch.save_file(expected.vit.state_dict(), start)
    still = ("train.learning_rate=1e-30", "train.final_learning_rate=0", "train.epochs=1", "train.seed=2")
    weights = [f"model.weights={start}"] if given else []
    result = train(source, tmp_path / "output", *still, *weights)
    written = safetensors.torch.load_file(result.weights)
    for name, tensor in expected.vit.state_dict().items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-6)
    assert f"From {f'`{start}`' if given else 'random weights'}, 1 epoch" in (tmp_path / "output/README.md").read_text()


def test_another_seed_is_another_training(undisturbed: tuple[Path, Any], source: Path, tmp_path: Path) -> None:
    train(source, tmp_path / "output", "train.seed=1", "train.epochs=1")
    ours, theirs = losses(tmp_path / "output"), losses(undisturbed[0])
    assert len(ours) == 6 and all(ours[step] != theirs[step] for step in ours)
