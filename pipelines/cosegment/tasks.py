"""Laying out sets on a Ray cluster: several small ones to a task; a large one is fitted by one task and shared out."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.cosegment.masks import SetImage
from pipelines.cosegment.worker import FittedSet, SegmentSetup, SetWork, fit_set, segment_batch, segment_sets
from pipelines.results.parts import SegmentReport
from pipelines.running.layout import Layout, plan_workers
from pipelines.running.tasks import as_task, finished_tasks
from pipelines.settings.sections import Config, CosegmentSettings

# Several each, where there are enough images, so that workers finish together.
LEAST_TASKS_PER_WORKER = 3
# Each is (least, most). Refining an image takes a second.
IMAGES_PER_REFINING_TASK, IMAGES_PER_PLAIN_TASK = (4, 16), (64, 512)
# Fitting a set takes a second or more.
MOST_SETS_PER_TASK = 8
# All tasks together hold descriptors and pictures in it.
TASKS_SHARE_OF_RAY_MEMORY = 0.25
LEAST_TASK_MEMORY_BYTES, MOST_TASK_MEMORY_BYTES = 64 * 2**20, 4 * 2**30
CROPPING_TASK_GPUS = 0.25


@dataclass(frozen=True)
class PendingSet:
    """A set that has images left to segment.

    members, left, outliers: positions in the table of images, ascending.
    """

    set_id: str
    version: str
    members: np.ndarray
    left: np.ndarray
    outliers: np.ndarray

    @property
    def partly_done(self) -> bool:
        return len(self.left) < len(self.members)


def fit_sample(members: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the members, spread evenly over them, one at random in each stretch; ascending."""
    if len(members) <= most:
        return members
    shares = np.random.default_rng(seed).random(most)
    return members[((np.arange(most) + shares) * (len(members) / most)).astype(np.int64)]


def batch_size(asked: CosegmentSettings, pending: int, workers: int) -> int:
    """How many images a task segments."""
    least, most = IMAGES_PER_REFINING_TASK if asked.refine else IMAGES_PER_PLAIN_TASK
    return int(np.clip(pending // (workers * LEAST_TASKS_PER_WORKER), least, most))


def is_shared(one: PendingSet, batch: int, fit_images: int) -> bool:
    """Whether a set is fitted by a task of its own and then segmented by several."""
    return one.partly_done or len(one.left) > batch or len(one.members) > fit_images


def cut_sets(sets: Sequence[PendingSet], batch: int, fit_images: int) -> Iterator[list[PendingSet]]:
    """What each task begins with: shared sets come first, one a task; then small sets, as many as fill a batch."""
    small = []
    for one in sets:
        if is_shared(one, batch, fit_images):
            yield [one]
        else:
            small.append(one)
    group: list[PendingSet] = []
    held = 0
    for one in small:
        if group and (held + len(one.left) > batch or len(group) == MOST_SETS_PER_TASK):
            yield group
            group, held = [], 0
        group.append(one)
        held += len(one.left)
    if group:
        yield group


def plan_segmentation(resources: Mapping[str, float], config: Config) -> Layout:
    """The tasks that run at once. Only crops need the model, and with it a GPU where there is one.

    config: of the run. Raises RequestError when the cluster does not have what was asked for.
    """
    crops = config.cosegment.crop_augmentations > 0
    return plan_workers(
        resources, config, usual_cpus=1.0, usual_gpus=CROPPING_TASK_GPUS, uses_gpu=crops, whole_cpus=True
    )


def stream_reports(
    setup: SegmentSetup,
    sets: Sequence[PendingSet],
    describe: Callable[[np.ndarray, np.ndarray], list[SetImage]],
    layout: Layout,
    resources: Mapping[str, float],
) -> Generator[SegmentReport]:
    """Segment sets on Ray and yield what its workers wrote, in the order in which they finish.

    describe: what tasks need to know of images at some positions, of which some are outliers.

    Raises JobError for what stops a worker.
    """
    import ray

    asked = setup.asked
    workers = layout.workers
    memory = resources.get("memory", LEAST_TASK_MEMORY_BYTES) * TASKS_SHARE_OF_RAY_MEMORY / workers
    setup = replace(setup, memory=float(np.clip(memory, LEAST_TASK_MEMORY_BYTES, MOST_TASK_MEMORY_BYTES)))
    batch = batch_size(asked, sum(len(one.left) for one in sets), workers)
    whole, fit = as_task(segment_sets, layout), as_task(fit_set, layout)
    part = as_task(segment_batch, layout, gpu=False)

    def work(one: PendingSet, images: np.ndarray, fit_on: bool) -> SetWork:
        chosen = (
            fit_sample(np.setdiff1d(one.members, one.outliers), asked.fit_images, asked.seed) if fit_on else images[:0]
        )
        return SetWork(one.set_id, one.version, describe(chosen, one.outliers), describe(images, one.outliers))

    begin = cut_sets(sets, batch, asked.fit_images)
    batches_of_fitted_sets: deque[tuple[PendingSet, np.ndarray, Any]] = deque()
    fitting: dict[Any, PendingSet] = {}

    def submit() -> Any:
        """The next task, or None when there is none to begin yet."""
        if batches_of_fitted_sets:
            one, images, model = batches_of_fitted_sets.popleft()
            return part.remote(setup, work(one, images, fit_on=False), model)
        group = next(begin, None)
        if group is None:
            return None
        if is_shared(group[0], batch, asked.fit_images):
            task = fit.remote(setup, work(group[0], group[0].left[:0], fit_on=True))
            fitting[task] = group[0]
            return task
        return whole.remote(setup, [work(one, one.left, fit_on=True) for one in group])

    with contextlib.closing(finished_tasks(submit, workers, "the co-segmentation")) as finished:
        for task, found in finished:
            if (one := fitting.pop(task, None)) is None:
                yield found
                continue
            yield _of_fit(one, found)
            if found.model is not None:
                model = ray.put(found)
                batches_of_fitted_sets.extend((one, images, model) for images in _batches(one.left, batch))


def _of_fit(one: PendingSet, fitted: FittedSet) -> SegmentReport:
    """What fitting took, as a report without rows."""
    failed = {one.set_id: fitted.failed} if fitted.model is None else {}
    return SegmentReport(
        None, None, failed=failed, seconds=dict(fitted.spent.seconds), bytes_read=fitted.spent.bytes_read
    )


def _batches(positions: np.ndarray, size: int) -> list[np.ndarray]:
    return [positions[first : first + size] for first in range(0, len(positions), size)]
