"""train: images -> a checkpoint that `extract` loads, by self-distillation through Ray Train.

list INPUT -> workers continue from the latest checkpoint -> weights, log and model card in OUTPUT
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.errors import DinorayError, JobError, RequestError
from pipelines.running.cpus import available_cpus
from pipelines.running.interrupts import interruptible
from pipelines.running.layout import Layout, device_of, plan_workers
from pipelines.running.progress import ProgressLine
from pipelines.running.ray_session import explain_ray_error, ray_session
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.differences import differences
from pipelines.settings.sections import Config
from pipelines.sources import list_images
from pipelines.store.weights import checked
from pipelines.train.card import write_card
from pipelines.train.checkpoints import list_checkpoints, read_checkpoint
from pipelines.train.log import read_log
from pipelines.train.output import card_uri, extract_command, read_unreadable, weights_uri, write_unreadable
from pipelines.train.setup import IMAGES_DIGEST_KEY, TrainSetup, make_setup

POLL_SECONDS = 0.5
CROP_WORKERS_PER_TRAINING_CPU = 0.5
# Workers that are to stop write a checkpoint first.
STOP_TIMEOUT_SECONDS = 120.0


@dataclass
class Result(JobResult):
    """What a run of train did, or would do.

    store: OUTPUT. steps: of the whole training. images_per_second: the median over this run's lines of the log. loss:
    the mean over the last line of the log. unreadable: how many images were replaced by others. weights: URI of the
    safetensors file. use: the command that extracts with it. seconds: plan, start, train and total.
    """

    input: str
    model: str
    images: int = 0
    labelled: int = 0
    steps: int = 0
    steps_done: int = 0
    resumed_from: int = 0
    workers: int = 0
    device: str = ""
    epochs: int = 0
    images_per_second: float | None = None
    loss: float | None = None
    knn_accuracy: float | None = None
    unreadable: int = 0
    weights: str = ""
    use: str = ""


def run(config: Config, *, input: str, output: str, dry_run: bool = False) -> Result:
    """Train on the images of INPUT; the same command continues a training that was stopped.

    Raises:
        RequestError, sources.InputError, dino_ops.errors.ModelError: the request was wrong, or OUTPUT holds another
            training.
        JobError: the job failed; its checkpoints stay.
    """
    started = time.monotonic()
    uri, options = storage.normalise(output), config.storage.options
    images = list_images(input, storage_options=options, exclude=uri).table
    validation = None
    if config.train.validation is not None:
        validation = list_images(config.train.validation, storage_options=options).table
    result = Result(new_run_id(), uri, input, config.model.name)
    training = make_setup(config, uri, images, result.run_id)
    result.images, result.labelled = len(images), len(images) - images["label"].null_count
    result.steps, result.epochs = training.steps, training.recipe.epochs
    result.weights, result.use = weights_uri(uri), extract_command(training)
    layout_checks(training)
    if steps := list_checkpoints(uri, options):
        result.resumed_from = result.steps_done = steps[-1]
        _agree(training, steps[-1], options)
    elif training.weights != "random":
        _weights_fit(training)
    if dry_run:
        return result.ended("dry_run", started)
    # the card is written last
    if result.steps_done >= training.steps and _exists(result.weights, options) and _exists(card_uri(uri), options):
        return result.ended("unchanged", started)

    report = RunReport("train", uri, config, result.run_id, {"input": input})
    with recorded(report, result, started, agreement=training.agreement()):
        result.seconds["plan"] = time.monotonic() - started
        if result.resumed_from:
            result.messages.append(f"Continued after step {result.resumed_from:,} of an earlier run.")
        _train(training, images, validation, result)
    return result


def _exists(uri: str, options: storage.Options) -> bool:
    fs, path = storage.filesystem(uri, options)
    with storage.reaching(uri):
        return bool(fs.exists(path))


def layout_checks(training: TrainSetup) -> None:
    """Raises RequestError for crops that are no whole patches, and ModelError for what the model cannot do."""
    from dino_ops.models import describe

    patch = describe(training.config.model.name).patch_size
    for key in ("global_size", "local_size"):
        size = getattr(training.recipe.multicrop, key)
        if size % patch:
            nearest = max(patch, round(size / patch) * patch)
            raise RequestError(
                f"train.{key} is {size} pixels, which is not a whole number of the {patch}-pixel patches of "
                f"{training.config.model.name}: use {nearest}."
            )


def _weights_fit(training: TrainSetup) -> None:
    """Raises ModelError for weights of another model, before anything is written."""
    from dino_ops.models import create_model

    create_model(training.config.model.name, checked(training.config, training.weights_identity))


def _agree(training: TrainSetup, step: int, options: storage.Options) -> None:
    """Raises RequestError where OUTPUT holds a training of something else."""
    _, before = read_checkpoint(training.output, step, options)
    now = json.loads(json.dumps(training.agreement()))
    before = json.loads(json.dumps(before))
    settings = now.keys() - {IMAGES_DIGEST_KEY}
    differing = differences(before, now, "{key} was {before}, now {asked}", only=settings)
    differing += ["INPUT has other images"] if before.get(IMAGES_DIGEST_KEY) != now[IMAGES_DIGEST_KEY] else []
    if differing:
        raise RequestError(
            f"{training.output} holds a training of something else ({'; '.join(differing)}): give the same settings to "
            "continue it, or another OUTPUT."
        )


@dataclass(frozen=True)
class TrainingLayout(Layout):
    """The workers of a training. crop_workers: processes of each that make crops, on crop_cpus each."""

    crop_workers: int
    crop_cpus: float


def plan_layout(resources: Mapping[str, float], config: Config, batch_size: int) -> TrainingLayout:
    """One worker a GPU, or one for all CPUs; as run.workers, cpus_per_worker and gpus_per_worker say.

    Raises RequestError for what the cluster does not have, and for a batch that workers cannot share evenly.
    """
    cpus = resources.get("CPU", 1.0)
    on_gpu = device_of(resources, config) == "cuda"  # the other CPUs make crops
    usual_cpus = 1.0 if on_gpu else max(1.0, min(cpus, available_cpus()))
    most = None if on_gpu else 1
    plan = plan_workers(resources, config, usual_cpus=usual_cpus, least_cpus=1.0, most_workers=most)
    if batch_size % plan.workers:
        nearest = max(1, round(batch_size / plan.workers)) * plan.workers
        raise RequestError(
            f"train.batch_size is {batch_size}, which {plan.workers} workers cannot share evenly: use {nearest}."
        )
    shared = (plan.device, plan.workers, plan.cpus, plan.gpus)
    if not on_gpu:
        # Crops are made beside the training, on the same CPUs.
        crop_workers = max(1, round(CROP_WORKERS_PER_TRAINING_CPU * plan.cpus))
        return TrainingLayout(*shared, crop_workers=crop_workers, crop_cpus=0.0)
    spare = int((cpus - plan.workers * plan.cpus) / plan.workers)
    return TrainingLayout(*shared, crop_workers=max(1, spare), crop_cpus=1.0 if spare else 0.0)


def _train(training: TrainSetup, images: pa.Table, validation: pa.Table | None, result: Result) -> None:
    """Run the workers, show how far they are, and write the model card."""
    config = training.config
    began = time.monotonic()
    with ray_session(config.run) as resources, interruptible():
        import ray
        from ray.exceptions import RayError

        from pipelines.train.accuracy import K, choose_labelled
        from pipelines.train.monitor import Monitor
        from pipelines.train.worker import TrainWorkerSetup

        layout = plan_layout(resources, config, training.recipe.batch_size)
        result.workers, result.device = layout.workers, layout.device
        labelled = None
        if config.train.evaluate_epochs:
            labelled = choose_labelled(images, validation, config.train.evaluate_images, training.recipe.seed)
            if labelled is None:
                result.messages.append(
                    f"No k-NN accuracy: it takes more than {K} images with labels, of two kinds at least."
                )
        known_bad = read_unreadable(training.output, config.storage.options) if result.resumed_from else []
        monitor = ray.remote(Monitor).options(num_cpus=0).remote(known_bad)
        setup = TrainWorkerSetup(
            training=training,
            listing=ray.put(images),
            labelled=None if labelled is None else ray.put(labelled),
            monitor=monitor,
            device=layout.device,
            threads=max(1, int(layout.cpus)),
            crop_workers=layout.crop_workers,
            crop_cpus=layout.crop_cpus,
        )
        fit = _Fit(setup, layout, config.run.attempts)
        try:
            _follow(fit, monitor, training, result, began)
        except RayError as error:
            raise explain_ray_error(error, "the training") from None
        finally:
            bad = ray.get(monitor.bad_images.remote()) if ray.is_initialized() else []
            result.unreadable = len(bad)
            # A full disk must not hide what it broke.
            with contextlib.suppress(OSError, DinorayError):
                write_unreadable(training.output, bad, config.storage.options)
    records = read_log(training.output, config.storage.options)
    if result.steps_done >= training.steps:
        write_card(training, records, result)


class _Fit:
    """Ray Train's run, in a thread of its own, so that this one can watch and be interrupted."""

    def __init__(self, setup: Any, layout: TrainingLayout, attempts: int) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(setup, layout, attempts), daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self, setup: Any, layout: TrainingLayout, attempts: int) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from pipelines.train.worker import train_worker

        resources = {"CPU": layout.cpus} | ({"GPU": layout.gpus} if layout.gpus else {})
        with tempfile.TemporaryDirectory() as scratch:  # Ray's own notes; checkpoints are ours, in OUTPUT
            try:
                TorchTrainer(
                    train_worker,
                    train_loop_config={"setup": setup},
                    scaling_config=ScalingConfig(
                        num_workers=layout.workers, use_gpu=layout.gpus > 0, resources_per_worker=resources
                    ),
                    run_config=RunConfig(
                        name=setup.training.run_id,
                        storage_path=scratch,
                        failure_config=FailureConfig(max_failures=attempts),
                    ),
                ).fit()
            except BaseException as error:  # handed to the thread that watches
                self.error = error


def _follow(fit: _Fit, monitor: Any, training: TrainSetup, result: Result, began: float) -> None:
    """Show the progress until the training ends. Raises its errors; when interrupted it first writes a checkpoint."""
    import ray

    from pipelines.train.monitor import CollapseWatch

    watch = CollapseWatch(training.recipe.out_dim, training.steps)
    per_step = training.recipe.batch_size
    rates: list[float] = []
    known = 0
    outcome: dict[str, Any] | None = None
    with ProgressLine(training.steps * per_step) as line:
        interrupted: BaseException | None = None
        deadline = float("inf")
        while outcome is None and time.monotonic() < deadline:
            try:
                running = fit.running
                news = ray.get(monitor.news.remote(known))
                if news["started"] and "start" not in result.seconds:
                    result.seconds["start"] = time.monotonic() - began
                    line.restart(news["started"]["resumed_from"] * per_step, 0)
                for record in news["records"]:
                    known += 1
                    _take(record, result, line, per_step, rates)
                    for sentence in watch.look(record):
                        result.messages.append(sentence)
                        line.say(sentence)
                outcome = news["outcome"]
                if outcome is None and not running:
                    break
                time.sleep(POLL_SECONDS)
            except KeyboardInterrupt as signal:
                if interrupted is not None:
                    raise
                interrupted, deadline = signal, time.monotonic() + STOP_TIMEOUT_SECONDS
                line.say("Stopping after a checkpoint; once more stops at once.")
                monitor.stop.remote()
    result.seconds["train"] = time.monotonic() - began - result.seconds.get("start", 0.0)
    result.images_per_second = round(sorted(rates)[len(rates) // 2], 2) if rates else None
    if outcome is not None and "error" in outcome:
        raise JobError(outcome["error"]) if outcome["exit_code"] == 1 else RequestError(outcome["error"])
    if outcome is not None:
        result.steps_done = outcome["steps"]
    if interrupted is not None and (outcome is None or outcome["stopped"]):
        raise KeyboardInterrupt
    if outcome is None:
        raise explain_ray_error(fit.error or RuntimeError("it ended without a message"), "the training")


def _take(record: dict[str, Any], result: Result, line: ProgressLine, per_step: int, rates: list[float]) -> None:
    """Note a record of the log."""
    if "knn_accuracy" in record:
        result.knn_accuracy = record["knn_accuracy"]
        line.say(f"epoch {record['epoch']:g}: k-NN accuracy {record['knn_accuracy']:.1%}")
        return
    result.loss, result.steps_done = record["loss"], record["step"]
    rates.append(record["images_per_second"])
    line.note = f"loss {record['loss']:.3f}"
    line.advance(record["step"] * per_step - line.done, 0)
