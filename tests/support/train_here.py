"""Trainings of a tiny network in this process: what Ray Train runs in processes of its own, without their start."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray as ray_api
import torch

from dino_ops.errors import ModelError
from pipelines.errors import DinorayError
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config
from pipelines.train import job
from pipelines.train.batches import CropWorker, CropWorkers, Reading
from pipelines.train.checkpoints import read_checkpoint
from pipelines.train.worker import Worker

# timm's: 16 pixel patches, six blocks of 64 channels.
MODEL = "test_vit"
TINY = [
    f"model.name={MODEL}",
    "model.device=cpu",
    "run.workers=1",
    *("train.global_size=32", "train.local_size=16", "train.local_crops=2"),
    *("train.out_dim=64", "train.hidden_dim=32", "train.bottleneck_dim=16"),
    *("train.batch_size=4", "train.epochs=2", "train.warmup_epochs=1", "train.log_steps=1"),
    "train.evaluate_epochs=0",
]


def tiny(*overrides: str) -> Config:
    return load_config([], [*TINY, *overrides])


def options(*overrides: str) -> list[str]:
    """The same for the command line."""
    return [part for override in (*TINY, *overrides) for part in ("--set", override)]


def train(source: object, output: object, *overrides: str, **more: Any) -> job.Result:
    return job.run(tiny(*overrides), input=str(source), output=str(output), **more)


class FitHere:
    """As job._Fit, with the only worker in a thread of this process."""

    def __init__(self, setup: Any, layout: job.Layout, attempts: int) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(setup,), daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self, setup: Any) -> None:
        threads = torch.get_num_threads()
        try:
            Worker(setup, 0, 1).run()
        except (DinorayError, ModelError) as error:  # train_worker reports them like this
            code = getattr(error, "exit_code", 2)
            ray_api.get(setup.monitor.end.remote(error=str(error), exit_code=code))
        except BaseException as error:
            self.error = error
        finally:
            torch.set_num_threads(threads)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask a training to stop, as a signal does, when it has done this many steps."""
    report = Worker._report

    def reporting(worker: Worker, step: int, *arguments: Any) -> bool:
        return report(worker, step, *arguments) or step >= steps

    monkeypatch.setattr(Worker, "_report", reporting)


class Killed(Exception):
    """What a test raises where a process would be gone."""


def die_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Let a call end the worker, and nothing of it be written any more."""
    call = getattr(owner, name)

    def dying(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            monkeypatch.setattr("pipelines.train.log.TrainingLog.close", lambda log: None)
            raise Killed
        return call(*arguments, **named)

    monkeypatch.setattr(owner, name, dying)


def log_of(output: Path) -> list[dict[str, Any]]:
    """Lines of all segments as they are in the files, by step, a loss before the accuracy after it."""
    lines = [json.loads(line) for path in (output / "log").glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], "knn_accuracy" in line))


def losses(output: Path) -> dict[int, float]:
    lines = [line for line in log_of(output) if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step is logged twice"
    return found


def accuracies(output: Path) -> dict[int, float]:
    lines = [line for line in log_of(output) if "knn_accuracy" in line]
    found = {line["step"]: line["knn_accuracy"] for line in lines}
    assert len(found) == len(lines), "an accuracy is logged twice"
    return found


def final_state(output: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint under its path."""
    state, _ = read_checkpoint(str(output), step, {})
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}")
        elif isinstance(value, list):
            for at, inner in enumerate(value):
                walk(inner, f"{path}/{at}")

    walk(state, "")
    return found


def assert_same_training(one: Path, other: Path, steps: int, tolerance: float = 0.0) -> None:
    """The same losses at every step, and the same state at the end, bit for bit unless a tolerance is given."""
    ours, theirs = losses(one), losses(other)
    assert list(ours) == list(theirs) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=0, atol=tolerance)
    state, expected = final_state(one, steps), final_state(other, steps)
    assert state.keys() == expected.keys() and len(state) > 100
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


class CropsHere(CropWorkers):
    """Crops made in this process at the moment that they are asked for."""

    def __init__(self, listing: Any, reading: Reading, count: int, cpus: float) -> None:
        self._worker = CropWorker(ray_api.get(listing), reading)
        self.count = count

    def crops(self, order: Any, *arguments: Any) -> Any:
        return ray_api.put(self._worker.crops(ray_api.get(order), *arguments))

    def views(self, table: Any, *arguments: Any) -> Any:
        return ray_api.put(self._worker.views(ray_api.get(table), *arguments))


@contextmanager
def training_here(*, crops: bool = True) -> Iterator[None]:
    """crops: whether they too are made in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_Fit", FitHere)
        patch.setattr(job, "POLL_SECONDS", 0.05)
        if crops:
            patch.setattr("pipelines.train.worker.CropWorkers", CropsHere)
        yield
