"""dinoray train through Ray Train: workers that share a batch, signals and kills in mid-epoch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from deltalake import DeltaTable
from small_runs import photo
from train_here import accuracies, assert_same_training, final_state, losses, options

from dino_ops.extractor import Extractor

pytestmark = pytest.mark.slow

IMAGES, STEPS = 24, 90  # epochs of six steps
ASKED = (
    *("train.epochs=15", "train.checkpoint_steps=10", "train.keep_checkpoints=100", "train.evaluate_epochs=5"),
    *("train.drop_path=0.1", "run.cpus_per_worker=1"),
)


def command(source: Path, output: Path, *overrides: str) -> list[str]:
    program = Path(sys.executable).with_name("dinoray")
    return [str(program), "train", str(source), str(output), *options(*ASKED, *overrides)]


def finish(source: Path, output: Path, *overrides: str) -> None:
    done = subprocess.run(command(source, output, *overrides), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (output / "backbone.safetensors").exists() and (output / "README.md").exists()


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_all(process: subprocess.Popen[str]) -> None:
    """End the driver, Ray and all workers at once, as a machine does that loses its power."""
    below = descendants(process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in below:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(below, timeout=30)


@contextmanager
def started(source: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(source, output),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_all(process)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, f"the training ended before: {process.stderr.read() if process.stderr else ''}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def saved(output: Path, step: int) -> bool:
    return (output / "checkpoints" / f"step-{step:08}.pt").exists()


def last_saved(output: Path) -> int:
    return max(int(path.stem.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*.pt"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    for number in range(IMAGES):
        path = folder / ("cat" if number % 2 else "dog") / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo(number).save(path, quality=92)
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "output"
    finish(source, output)
    return output


def check_same(output: Path, undisturbed: Path) -> None:
    assert_same_training(output, undisturbed, STEPS)
    assert accuracies(output) == accuracies(undisturbed) and list(accuracies(output)) == [0, 30, 60, 90]


def assert_near(one: Path, other: Path, steps: int) -> None:
    """Losses of the first steps, and the centre after them."""
    ours, theirs = (list(losses(output).values())[:steps] for output in (one, other))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    state, expected = final_state(one, steps), final_state(other, steps)
    (name,) = [name for name in state if name.startswith("/dino_loss/")]
    assert name.endswith(("center", "centre"))
    np.testing.assert_allclose(state[name], expected[name], rtol=0, atol=1e-4)


def test_two_workers_do_what_one_does(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    finish(source, tmp_path / "output", "run.workers=2")
    (report,) = (tmp_path / "output" / "runs").glob("*.json")
    assert json.loads(report.read_text())["result"]["workers"] == 2
    assert_near(tmp_path / "output", undisturbed, 20)
    assert list(losses(tmp_path / "output")) == list(range(1, STEPS + 1))


def test_two_workers_balance_and_normalise_the_whole_batch(source: Path, tmp_path: Path) -> None:
    asked = (
        "train.centring=sinkhorn",
        "train.head_batch_norm=true",
        "train.epochs=4",
        "train.evaluate_epochs=0",
        "train.checkpoint_steps=20",
    )
    for workers in (1, 2):
        finish(source, tmp_path / f"output{workers}", *asked, f"run.workers={workers}")
    assert_near(tmp_path / "output2", tmp_path / "output1", 20)


def test_sigterm_saves_and_the_same_command_goes_on(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with started(source, output) as process:
        wait_for(lambda: saved(output, 10), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "Interrupted" in err and "Traceback" not in out + err
    step = last_saved(output)
    assert 10 <= step < STEPS
    (report,) = (output / "runs").glob("*.json")
    told = json.loads(report.read_text())
    assert (told["status"], told["result"]["steps_done"]) == ("interrupted", step)
    assert list(losses(output)) == list(range(1, step + 1))
    finish(source, output)
    check_same(output, undisturbed)


def test_everything_killed_in_mid_epoch_and_continued(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with started(source, output) as process:
        wait_for(lambda: saved(output, 20), process)
        kill_all(process)
    assert 20 <= last_saved(output) < STEPS
    finish(source, output)
    check_same(output, undisturbed)


def test_a_killed_worker_is_started_again_and_the_run_ends_well(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with started(source, output) as process:
        wait_for(lambda: saved(output, 10), process)
        (victim,) = [one for one in descendants(process) if "RayTrainWorker" in " ".join(one.cmdline())]
        victim.kill()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    check_same(output, undisturbed)


def test_extract_takes_the_weights(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    program, weights, picture = (
        Path(sys.executable).with_name("dinoray"),
        undisturbed / "backbone.safetensors",
        "dog/00.jpg",
    )
    asked = ("model.name=test_vit", f"model.weights={weights}", "image.shorter_side=64", "features.layer=5")
    settings = [part for one in (*asked, "model.device=cpu") for part in ("--set", one)]
    extract = [str(program), "extract", str(source / picture), str(tmp_path / "store"), *settings]
    subprocess.run(extract, check=True, capture_output=True, timeout=300)
    (row,) = DeltaTable(tmp_path / "store" / "images").to_pyarrow_table().to_pylist()
    checkpoint = undisturbed / "checkpoints" / f"step-{STEPS:08}.pt"  # the teacher in it is the same network
    extractor = Extractor("test_vit", weights=checkpoint, shorter_side=64, layer=5, device="cpu")
    np.testing.assert_allclose(row["embedding"], extractor(source / picture).embedding, atol=2e-3)
