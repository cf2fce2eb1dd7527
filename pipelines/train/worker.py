"""One process of a training, as Ray Train starts it on every GPU or share of the CPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dino_ops.devices import resolve_precision
from dino_ops.errors import ModelError
from dino_ops.models import create_model, describe
from dino_ops.self_distillation import SelfDistillation, StepReport
from pipelines import storage
from pipelines.errors import DinorayError, JobError
from pipelines.store import weights
from pipelines.train.accuracy import LabelledImages, knn_accuracy
from pipelines.train.batches import BadImage, Batches, CropWorkers, Reading
from pipelines.train.checkpoints import list_checkpoints, read_checkpoint, remove_old, write_checkpoint
from pipelines.train.log import TrainingLog
from pipelines.train.output import write_unreadable, write_weights
from pipelines.train.setup import TrainSetup, model_seed

MEANS = ("loss", "teacher_entropy", "divergence", "centre_norm")


@dataclass(frozen=True)
class TrainWorkerSetup:
    """What a process is given.

    listing, labelled: object references. monitor: the actor. threads: for torch. crop_workers: how many actors make
    crops for each process. crop_cpus: of each of these actors.
    """

    training: TrainSetup
    listing: Any
    labelled: Any
    monitor: Any
    device: str
    threads: int
    crop_workers: int
    crop_cpus: float


def train_worker(given: dict[str, Any]) -> None:
    """The function that Ray Train calls. Errors that are sentences go to the monitor: trying again would not help."""
    import ray
    import ray.train

    setup: TrainWorkerSetup = given["setup"]
    context = ray.train.get_context()
    try:
        Worker(setup, context.get_world_rank(), context.get_world_size()).run()
    except (DinorayError, ModelError) as error:
        ray.get(setup.monitor.end.remote(error=str(error), exit_code=getattr(error, "exit_code", 2)))
        raise SystemExit(1) from None


class Worker:
    """A process's part of the training."""

    def __init__(self, setup: TrainWorkerSetup, rank: int, processes: int) -> None:
        import ray

        self._setup, self._rank, self._processes = setup, rank, processes
        self._training = training = setup.training
        self._asked, self._options = training.config.train, training.config.storage.options
        self._device = _device(setup.device)
        if self._device.type == "cpu":
            torch.set_num_threads(setup.threads)
        start = (
            training.weights
            if training.weights == "random"
            else weights.checked(training.config, training.weights_identity)
        )
        model, seed = training.config.model, model_seed(training)
        self._distillation = SelfDistillation(
            create_model(model.name, start, seed=seed),
            create_model(model.name, start, seed=seed),
            training.recipe,
            training.steps_per_epoch,
            device=self._device,
            precision=resolve_precision(model.precision, self._device),
            accumulate=self._asked.accumulate,
            mean=training.config.image.mean,
            std=training.config.image.std,
        )
        reading = Reading(
            seed=training.recipe.seed,
            max_pixels=training.config.image.max_pixels,
            attempts=training.config.run.attempts,
            storage_options=self._options,
        )
        self._crop_workers = CropWorkers(setup.listing, reading, setup.crop_workers, setup.crop_cpus)
        self._labelled: LabelledImages | None = ray.get(setup.labelled) if setup.labelled is not None else None

    def run(self) -> None:
        """Train from the latest checkpoint, or from the beginning, to the end or until it is asked to stop."""
        import ray

        training = self._training
        self._saved = done = self._resume()
        log = TrainingLog(training.output, done, self._options) if self._rank == 0 else None
        if self._rank == 0:
            ray.get(self._setup.monitor.start.remote(resumed_from=done, device=self._device.type))
        stopped = False
        try:
            done, stopped = self._train(done, log)
            self._checkpoint(done, log)
            if self._rank == 0:
                state = self._distillation.backbone_state()
                self._writing(lambda: write_weights(training, state), "the weights", done)
                ray.get(self._setup.monitor.end.remote(steps=done, stopped=stopped))
        finally:
            if log is not None:
                # A full disk must not hide what it broke.
                with contextlib.suppress(OSError, JobError):
                    log.close()

    def _train(self, done: int, log: TrainingLog | None) -> tuple[int, bool]:
        """(steps done, whether it was asked to stop)."""
        training, asked = self._training, self._asked
        patch = describe(training.config.model.name).patch_size
        batches = Batches(
            self._crop_workers,
            training.images,
            training.recipe.batch_size,
            training.recipe.seed,
            lambda epoch: training.recipe.multicrop_at(epoch, patch),
            rank=self._rank,
            processes=self._processes,
        )
        self._saved_at = time.monotonic()
        if self._evaluation_is_due(done):
            self._evaluate(done, log)
        began = time.monotonic()
        reports: list[StepReport] = []
        bad: list[BadImage] = []
        for crops, unreadable in batches.between(done, training.steps):
            reports.append(self._distillation.step(done, crops))
            bad += unreadable
            done += 1
            # lines end where those of a training that was never stopped end, and a checkpoint has no step between lines
            saves = asked.checkpoint_steps is not None and done % asked.checkpoint_steps == 0
            if not (done % asked.log_steps == 0 or done % training.steps_per_epoch == 0 or saves):
                continue
            if self._report(done, reports, bad, time.monotonic() - began, log):
                return done, True
            if saves or done == training.steps or time.monotonic() - self._saved_at >= 60 * asked.checkpoint_minutes:
                self._checkpoint(done, log)
            # After the checkpoint: an evaluation takes long, and is repeated on continuing.
            if self._evaluation_is_due(done):
                self._evaluate(done, log)
            reports, bad, began = [], [], time.monotonic()
        return done, False

    def _evaluation_is_due(self, done: int) -> bool:
        epoch, into = divmod(done, self._training.steps_per_epoch)
        every = self._asked.evaluate_epochs
        return every > 0 and into == 0 and (epoch % every == 0 or done == self._training.steps)

    def _resume(self) -> int:
        """Load the latest checkpoint; how many steps it has seen."""
        steps = list_checkpoints(self._training.output, self._options)
        if not steps:
            return 0
        state, _ = read_checkpoint(self._training.output, steps[-1], self._options)
        self._distillation.load_state_dict(state)
        return steps[-1]

    def _report(
        self, step: int, reports: list[StepReport], bad: list[BadImage], seconds: float, log: TrainingLog | None
    ) -> bool:
        """Log the means of the last steps over all processes; whether all are to stop.

        Raises JobError where a loss is not finite, before a checkpoint is made of what came of it.
        """
        import ray

        means = torch.stack([torch.stack([getattr(report, name) for report in reports]).mean() for name in MEANS])
        asked_to_stop = torch.zeros(1, device=self._device)
        if self._processes > 1:
            dist.all_reduce(means)
            means /= self._processes
        if not torch.isfinite(means).all():
            raise JobError(_no_number(step))
        values = dict(zip(MEANS, means.tolist(), strict=True))
        last = reports[-1]
        record = {
            "step": step,
            "epoch": round(step / self._training.steps_per_epoch, 4),
            **{name: round(value, 6) for name, value in values.items()},
            "learning_rate": last.learning_rate,
            "weight_decay": last.weight_decay,
            "momentum": last.momentum,
            "teacher_temperature": last.teacher_temperature,
            "images_per_second": round(len(reports) * self._training.recipe.batch_size / seconds, 2),
            "time": round(time.time(), 1),
        }
        if self._rank == 0 or bad:
            records = [record] if self._rank == 0 else []
            stop = ray.get(self._setup.monitor.report.remote(records, [dataclasses.asdict(one) for one in bad]))
            asked_to_stop += float(stop and self._rank == 0)
        if log is not None:
            self._writing(lambda: log.add(record), "the log", step)
        if self._processes > 1:
            dist.all_reduce(asked_to_stop)
        return bool(asked_to_stop.item() > 0)

    def _evaluate(self, step: int, log: TrainingLog | None) -> None:
        import ray

        if self._labelled is None:
            return
        size = self._training.recipe.multicrop.global_size
        accuracy = knn_accuracy(
            self._distillation, self._labelled, size, self._crop_workers, self._rank, self._processes
        )
        if log is not None and accuracy is not None:
            record = {
                "step": step,
                "epoch": round(step / self._training.steps_per_epoch, 4),
                "knn_accuracy": round(accuracy, 6),
                "time": round(time.time(), 1),
            }
            ray.get(self._setup.monitor.report.remote([record], []))
            self._writing(lambda: log.add(record), "the log", step)

    def _checkpoint(self, done: int, log: TrainingLog | None) -> None:
        """Save what there is after `done` steps, unless that was done; the first process does."""
        import ray

        if log is None or self._saved == done:
            return
        output, options = self._training.output, self._options
        bad = ray.get(self._setup.monitor.bad_images.remote())

        if not self._distillation.is_finite():
            raise JobError(_no_number(done))

        def save() -> None:
            write_checkpoint(output, self._distillation.state_dict(), done, self._training.agreement(), options)
            remove_old(output, self._asked.keep_checkpoints, options)

        # what came before a checkpoint must be there when a training continues from it
        self._writing(lambda: log.start_segment(done), "the log", done)
        self._writing(lambda: write_unreadable(output, bad, options), "the list of unreadable images", done)
        self._writing(save, "the checkpoint", done)
        self._saved, self._saved_at = done, time.monotonic()

    def _writing(self, write: Any, what: str, step: int) -> None:
        """Raises JobError in words for a write that the storage refused."""
        try:
            write()
        except OSError as error:
            raise JobError(_explain(error, what, step, self._training.output, self._options)) from None


def _no_number(step: int) -> str:
    return (
        f"The loss is no longer a number (steps up to {step}); the checkpoints before are whole. Lower "
        "train.learning_rate, or set model.precision to float32 or bfloat16, and give another OUTPUT."
    )


def _explain(error: OSError, what: str, step: int, output: str, options: storage.Options) -> str:
    whole = list_checkpoints(output, options)
    reason = "there is no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    before = f"the last whole checkpoint is of step {whole[-1]}" if whole else "there is no checkpoint yet"
    return (
        f"After step {step} {what} could not be written to {output}: {reason}; {before}. Make room, and the same "
        "command continues from there."
    )


def _device(asked: str) -> torch.device:
    if asked != "cuda":
        return torch.device("cpu")
    import ray.train.torch

    return ray.train.torch.get_device()
