"""Requests that cannot be met: one sentence with what was asked, what was found and what to do; never a traceback."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from file_systems import enlarge, mounted
from hand_made import add_images, finished_store
from hand_made import source as listing_row
from small_runs import as_options, photo, settings
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.store.store import Store
from pipelines.upkeep import verify


def extract(source: object, store: object, *overrides: str, options: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(app, ["extract", str(source), str(store), *options, *as_options(*overrides)])


def sentence(result: Result, code: int = 2) -> str:
    """What standard error says: one sentence, and the exit code that belongs to it."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("dinoray: ") and "Traceback" not in line
    return line.removeprefix("dinoray: ")


def says(text: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in text


@pytest.fixture(autouse=True)
def no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine would show some before the sentence."""
    monkeypatch.setattr("pipelines.running.progress.LOG_SECONDS", float("inf"))


@pytest.fixture
def source(photos: Callable[..., Path]) -> Path:
    return photos(3)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A place where no store is yet; a wrong request must not make one."""
    return tmp_path / "store"


# INPUT


def test_a_missing_input(tmp_path: Path, store: Path) -> None:
    says(sentence(extract(tmp_path / "absent", store)), tmp_path / "absent", "does not exist", "give a folder")
    assert not store.exists()


def test_an_empty_input(tmp_path: Path, store: Path) -> None:
    (tmp_path / "empty").mkdir()
    says(sentence(extract(tmp_path / "empty", store)), tmp_path / "empty", "no images", "nothing in it")


def test_an_input_without_images(tmp_path: Path, store: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    (folder / "b.json").write_text("{}")
    says(sentence(extract(folder, store)), folder, "no images", "1 .txt", "1 .json")


def test_a_manifest_without_uri(tmp_path: Path, store: Path) -> None:
    manifest = tmp_path / "photos.csv"
    manifest.write_text("path,label\na.jpg,cat\n")
    says(sentence(extract(manifest, store)), manifest, "no `uri` column", "path, label")


def test_a_manifest_that_names_an_id_twice(source: Path, store: Path) -> None:
    manifest = source / "photos.csv"
    manifest.write_text("uri,id\ndog/0000.jpg,x\ncat/0001.jpg,x\n")
    says(sentence(extract(manifest, store)), manifest, "same id ('x'", "an id of its own")


@pytest.mark.parametrize("uri", ["foo://bucket/photos", "memory://photos"])
def test_an_input_that_no_worker_can_reach(uri: str, store: Path) -> None:
    says(sentence(extract(uri, store)), uri)


@pytest.mark.usefixtures("extract_here")
def test_a_tar_cut_short_ends_with_1_and_its_whole_images_are_extracted(source: Path, store: Path) -> None:
    path = source.parent / "photos.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(source.rglob("*.jpg")):
            archive.add(file, file.name)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: last.offset_data + last.size // 2])
    says(sentence(extract(path, store), 1), path, "damaged", last.name, "replace the file", "same command again")
    rows = DeltaTable(store / "images").to_pyarrow_table(columns=["image_id"]).to_pylist()
    assert len(rows) == 2
    (failure,) = DeltaTable(store / "failures").to_pyarrow_table().to_pylist()
    assert (failure["image_id"], failure["stage"]) == ("photos.tar", "list")
    assert verify.run(settings(), store=str(store)).problems == []

    path.write_bytes(whole[: last.offset_data - 512])
    pruning = extract(path, store, options=("--prune",))
    assert pruning.exit_code == 1 and "Nothing was pruned" in pruning.stderr

    path.write_bytes(whole)
    assert extract(path, store).exit_code == 0
    mended = verify.run(settings(), store=str(store))
    assert (mended.images, mended.failures, mended.problems) == (3, 0, [])


# STORE


def test_a_store_with_another_spec(source: Path, store: Path) -> None:
    finished_store(source, store, settings())
    text = sentence(extract(source, store, "features.stride=8", "store.dtype=int8"))
    says(text, store, "features.stride: the store has null, requested 8")
    says(text, 'store.dtype: the store has "float16", requested "int8"')
    says(text, "give the stored settings again", "or another STORE")
    assert "features.layer" not in text


def test_a_store_made_with_other_weights(source: Path, store: Path, tmp_path: Path) -> None:
    finished_store(source, store, settings())
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"other")
    says(sentence(extract(source, store, f"model.weights={weights}")), "model.weights", '"random:0"', "sha256:")


def test_a_store_that_is_a_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    says(sentence(extract(source, file)), file, "file", "give")
    assert file.read_text() == "text"


def test_a_store_below_a_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    says(sentence(extract(source, file / "store")), file / "store", "below a file", "give a folder")


def test_a_store_that_is_a_folder_of_something_else(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "letter.txt").write_text("text")
    says(sentence(extract(source, folder)), folder, "not a dinoray store", "letter.txt", "give an empty or new place")
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_a_store_that_is_the_input(source: Path) -> None:
    before = sorted(source.rglob("*"))
    says(sentence(extract(source, source)), source, "INPUT itself", "give another place")
    assert sorted(source.rglob("*")) == before


def test_a_store_inside_the_input_is_not_listed_as_images(source: Path) -> None:
    inside = source / "store"
    finished_store(source, inside, settings())
    photo(0).save(inside / "preview.jpg")
    result = extract(source, inside, options=("--json",))
    content = json.loads(result.stdout)
    assert (result.exit_code, content["listed"], content["skipped"], content["pending"]) == (0, 3, 0, 0)


@pytest.mark.parametrize("uri", ["foo://bucket/store", "memory://store"])
def test_a_store_that_no_worker_can_reach(uri: str, source: Path) -> None:
    says(sentence(extract(source, uri)), uri)


@pytest.mark.parametrize("name", ["a%20b", "50%25", "a\\b", "%2e%2e", "a\nb", "a\tb"])
def test_a_store_whose_path_is_read_in_two_ways(name: str, source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    says(sentence(extract(source, tmp_path / "places" / name / "store")), "STORE", "in its path", "without it")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("uri", ["s3://bucket/a#b", "s3://bucket/a?b", "s3://bucket/a%20b"])
def test_a_prefix_that_would_be_cut(uri: str, source: Path) -> None:
    says(sentence(extract(source, uri)), "STORE", "in its path", "without it")


@pytest.mark.parametrize("name", ["a b", "100%", "a%zz", "a#b", "a?b", "ä", "a'b", 'a"b', "[a]", "a;b", "-a", " a "])
def test_other_names_of_stores_work(name: str, tmp_path: Path) -> None:
    uri = str(tmp_path / name / "store")
    add_images(Store.create(uri, settings()), "r1", [listing_row("a")])
    found = verify.run(settings(), store=uri)
    assert (found.images, found.problems) == (1, [])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_too_long_for_a_folder(tmp_path: Path) -> None:
    uri = str(tmp_path / "store")
    add_images(Store.create(uri, settings()), "r1", [listing_row("a")])
    for command in ("index", "cluster", "cosegment"):
        says(sentence(CliRunner().invoke(app, [command, uri, "n" * 300])), "300 characters", "at most 200")


def test_a_store_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "readonly", "ro"):
        text = sentence(extract(source, tmp_path / "readonly" / "store"), 1)
    says(text, tmp_path / "readonly" / "store", "cannot be written", "read-only")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_a_store_without_permission(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    says(sentence(extract(source, folder / "store"), 1), folder / "store", "permission denied", "check the permissions")


@pytest.mark.usefixtures("ray")
def test_a_full_disk_ends_with_1_and_the_same_command_finishes_once_there_is_space(
    photos: Callable[..., Path], tmp_path: Path
) -> None:
    source, disk = photos(20), tmp_path / "disk"
    overrides = ("image.shorter_side=128", "run.images_per_shard=5")
    with mounted(disk, "size=400k"):
        text = sentence(extract(source, disk / "store", *overrides), 1)
        says(text, disk / "store", "full", "free some space and run the same command again")
        assert verify.run(settings(), store=str(disk / "store")).images < 20
        enlarge(disk)
        again = extract(source, disk / "store", *overrides)
        assert again.exit_code == 0, again.output
        whole = verify.run(settings(), store=str(disk / "store"))
        assert (whole.images, whole.problems) == (20, [])


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"a": 1}', ""])
@pytest.mark.parametrize("command", ["extract", "verify", "stats"])
def test_a_damaged_store_json(command: str, content: str, source: Path, store: Path) -> None:
    finished_store(source, store, settings())
    (store / "store.json").write_text(content)
    text = sentence(on_store(command, source, store), 1)
    says(text, store / "store.json", "damaged")


@pytest.mark.parametrize("command", ["extract", "verify", "stats"])
def test_a_store_of_a_newer_schema(command: str, source: Path, store: Path) -> None:
    finished_store(source, store, settings())
    description = json.loads((store / "store.json").read_text())
    description |= {"schema_version": 99, "fingerprint": "unknown", "spec": {"model": {"novelty": 1}}}
    (store / "store.json").write_text(json.dumps(description))
    says(sentence(on_store(command, source, store)), store, "newer dinoray", "99", "update dinoray")


@pytest.mark.parametrize("table", ["images", "patches", "failures"])
@pytest.mark.parametrize("command", ["extract", "verify", "stats"])
def test_a_damaged_log(command: str, table: str, source: Path, store: Path) -> None:
    finished_store(source, store, settings())
    log = max((store / table / "_delta_log").glob("*.json"))
    log.write_text("{this is not a log")
    result = on_store(command, source, store)
    # verify goes on, and lists what it finds
    text = result.stdout if command == "verify" else sentence(result, 1)
    assert result.exit_code == 1 and "Traceback" not in result.output
    says(text, f"{store.name}/{table}", "log", "damaged")


def on_store(command: str, source: Path, store: Path) -> Result:
    if command == "extract":
        return extract(source, store)
    return CliRunner().invoke(app, [command, str(store)])


@pytest.mark.parametrize("command", ["verify", "stats"])
def test_reading_a_store_that_is_not_there(command: str, source: Path, store: Path) -> None:
    for place in (store, source):
        says(sentence(CliRunner().invoke(app, [command, str(place)])), place, "no store", "dinoray extract INPUT")


# Models and weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def test_missing_weights(source: Path, store: Path, weights: Path) -> None:
    says(sentence(extract(source, store, f"model.weights={weights}")), weights, "does not exist", "pretrained")
    assert not store.exists()


def test_weights_of_another_architecture(source: Path, store: Path, weights: Path) -> None:
    import timm
    import torch

    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), weights)
    text = sentence(extract(source, store, f"model.weights={weights}"))
    says(text, weights, "do not fit vit_tiny_patch16_224", "looks like dino_vits16", "set model.name to that")
    assert not store.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"just some text\n", bytes(range(256)) * 20, b"PK\x03\x04" + bytes(100)],
    ids=["empty", "text", "garbage", "broken zip"],
)
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_that_holds_no_weights(source: Path, store: Path, tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    says(sentence(extract(source, store, f"model.weights={file}")), file, "weights")
    assert not store.exists()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("protocol", [2, 4])
def test_weights_that_would_run_code(source: Path, store: Path, weights: Path, protocol: int) -> None:
    marker = weights.parent / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    weights.write_bytes(pickle.dumps({"state_dict": Code()}, protocol))
    says(sentence(extract(source, store, f"model.weights={weights}")), weights, "refused", "run code", "state_dict")
    assert not marker.exists()


def test_an_unknown_model(source: Path, store: Path) -> None:
    says(sentence(extract(source, store, "model.name=dino_vits61")), "'dino_vits61'", "did you mean", "dino_vits16")
    assert not store.exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("features.stride=7", ["stride 7", "16 pixel patch", "1, 2, 4, 8, 16"]),
        ("features.layer=12", ["layer 12", "12 blocks", "0 to 11"]),
        ("features.extra=[{layer: 40}]", ["layer 40", "12 blocks", "0 to 11"]),
        ("features.saliency_heads=[0, 5]", ["saliency_heads [0, 5]", "'all' or heads from 0 to 2"]),
        ("store.pca=500", ["store.pca is 500", "192 dimensions", "give fewer"]),
    ],
)
def test_settings_that_the_model_cannot_meet(source: Path, store: Path, override: str, parts: list[str]) -> None:
    says(sentence(extract(source, store, override)), *parts)
    assert not store.exists()


def test_pretrained_weights_where_the_hub_is_switched_off(source: Path, store: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [str(Path(sys.executable).with_name("dinoray")), "extract", str(source), str(store)]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - started < 30, "10 s are meant; importing torch on a busy machine takes the rest"
    (line,) = done.stderr.splitlines()
    says(line, "dino", "HF_HUB_OFFLINE is set", "model.weights=/path/to/file", "model.weights=random")
    assert done.returncode == 2 and not store.exists()


def test_pretrained_weights_where_the_network_swallows_everything(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dino_ops.hub

    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never answers
        monkeypatch.setattr(dino_ops.hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(dino_ops.hub, "try_to_load_from_cache", lambda *arguments: None)
        started = time.monotonic()
        text = sentence(extract(source, store, "model.weights=pretrained"))
    assert time.monotonic() - started < 10
    says(text, "vit_tiny_patch16_224", "does not answer", "model.weights=/path/to/file")


# Machines


@pytest.mark.usefixtures("ray")
def test_a_gpu_where_there_is_none(source: Path, store: Path) -> None:
    import ray

    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    says(sentence(extract(source, store, "model.device=cuda")), "cuda", "no GPU", "model.device=auto or cpu")
    assert not store.exists()


@pytest.mark.usefixtures("ray")
def test_more_workers_than_cpus(source: Path, store: Path) -> None:
    text = sentence(extract(source, store, "run.workers=64", "run.cpus_per_worker=1"))
    says(text, "64 workers", "4 CPUs", "lower run.workers")
    assert not store.exists(), "it would be bound to a mistake"


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1"])
def test_a_cluster_that_is_not_there(address: str, source: Path, store: Path) -> None:
    options = as_options(f"run.address={address}")
    command = [str(Path(sys.executable).with_name("dinoray")), "extract", str(source), str(store), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    says(line, address, "could not be reached")
    assert done.returncode == 1 and not store.exists()


def test_rays_client_is_refused(source: Path, store: Path) -> None:
    text = sentence(extract(source, store, "run.address=ray://head:10001"))
    says(text, "ray://head:10001", "run.address=auto", "ray job submit")
    assert not store.exists()


@pytest.mark.usefixtures("ray")
def test_more_dimensions_than_the_images_have_patches(store: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    photo(1).resize((32, 32)).save(tmp_path / "small" / "a.png")
    result = extract(tmp_path / "small", store, "store.pca=20", "image.shorter_side=32")
    assert result.exit_code == 1
    says(result.stderr, "store.pca=20 needs at least as many patches", "the sample of 1 image gave 4")
    assert not store.exists()
