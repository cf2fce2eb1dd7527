"""Batches of crops: made ahead of the training by Ray actors, in an order that depends on seed and epoch alone.

Every process of a training takes its own share of every batch. A batch can be asked for by its number, so a training
that was stopped continues with exactly the images and crops that would have come next.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dino_ops.decoding import decode_image
from dino_ops.errors import ImageError
from dino_ops.multicrop import Crops, MultiCrop, centre_crop, resized_side
from pipelines.errors import JobError
from pipelines.running.ray_session import explain_ray_error
from pipelines.sources import fetch
from pipelines.storage.secrets import hidden, without_credentials

IMAGES_A_PIECE = 16
BATCHES_AHEAD = 3
# This many bad images in a row are no accident.
MAX_SUBSTITUTES_PER_IMAGE = 20


@dataclass(frozen=True)
class Reading:
    """How images are read. storage_options: for fsspec. max_pixels: of one image."""

    seed: int
    max_pixels: int
    attempts: int
    storage_options: dict[str, Any]


@dataclass(frozen=True)
class BadImage:
    """An image that could not be used, and why. error: the name of the error's class."""

    image_id: str
    uri: str
    error: str
    message: str


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in an epoch: a permutation of their positions in the listing, (images,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def make_crops(
    listing: pa.Table, order: np.ndarray, places: range, epoch: int, crops: MultiCrop, reading: Reading
) -> tuple[Crops, list[BadImage]]:
    """Crops of the images at some places of an epoch's order. An image that cannot be read is replaced by another.

    Which one depends on its place alone, so that another number of processes trains on the same images.

    Raises JobError where many in a row cannot be read.
    """
    pictures, bad = read_images(listing, order[places.start : places.stop], crops.least_side, reading)
    made = []
    for place, picture in zip(places, pictures, strict=True):
        image = int(order[place])
        if picture is None:
            image, picture = _substitute(listing, order, place, crops.least_side, reading, bad)
        made.append(crops(picture, np.random.default_rng([reading.seed, epoch, image])))
    return Crops.joined(made), bad


def make_views(
    listing: pa.Table, rows: np.ndarray, size: int, reading: Reading
) -> tuple[np.ndarray, np.ndarray, list[BadImage]]:
    """The middles of images as evaluation sees them: ((n, size, size, 3) uint8, which of `rows` they are, bad ones)."""
    pictures, bad = read_images(listing, rows, resized_side(size), reading)
    views = [centre_crop(picture, size) for picture in pictures if picture is not None]
    good = np.array([picture is not None for picture in pictures], bool)
    return np.stack(views) if views else np.zeros((0, size, size, 3), np.uint8), rows[good], bad


def read_images(
    listing: pa.Table, rows: np.ndarray, least_side: int, reading: Reading
) -> tuple[list[Any], list[BadImage]]:
    """The RGB images in some rows of a listing, None for those that cannot be read; and why they cannot.

    least_side: see `decode_image`.
    """
    wanted = listing.take(pa.array(rows))
    pictures, bad = [], []
    fetched = fetch(wanted, storage_options=reading.storage_options, attempts=reading.attempts)
    for at, one in enumerate(fetched):
        picture, error = None, one.error
        if one.data is not None:
            try:
                picture = decode_image(one.data, reading.max_pixels, least_side)
            except ImageError as problem:
                error = problem
        if picture is None:
            image_id, uri = wanted["image_id"][at].as_py(), without_credentials(wanted["uri"][at].as_py())
            message = hidden(str(error)) or type(error).__name__
            bad.append(BadImage(image_id, uri, type(error).__name__, message))
        pictures.append(picture)
    return pictures, bad


def _substitute(
    listing: pa.Table, order: np.ndarray, place: int, least_side: int, reading: Reading, bad: list[BadImage]
) -> tuple[int, Any]:
    """The first readable image from the other half of the epoch: its row and the image."""
    for further in range(MAX_SUBSTITUTES_PER_IMAGE):
        row = int(order[(place + len(order) // 2 + further) % len(order)])
        (picture,), its_problem = read_images(listing, np.array([row]), least_side, reading)
        bad += its_problem
        if picture is not None:
            return row, picture
    raise JobError(
        f"{MAX_SUBSTITUTES_PER_IMAGE + 1} images in a row cannot be read (the last one {bad[-1].uri}: "
        f"{bad[-1].message}): check INPUT and the access to it."
    )


class CropWorker:
    """A Ray actor that reads images and makes crops and views of them."""

    def __init__(self, listing: pa.Table, reading: Reading) -> None:
        self._listing, self._reading = listing, reading

    def crops(self, order: np.ndarray, places: range, epoch: int, multicrop: MultiCrop) -> tuple[Crops, list[BadImage]]:
        return make_crops(self._listing, order, places, epoch, multicrop, self._reading)

    def views(self, table: pa.Table, rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, list[BadImage]]:
        return make_views(table, rows, size, self._reading)


class CropWorkers:
    """This process's actors; each call goes to the next one, and a result that is lost with its actor is made again."""

    def __init__(self, listing: Any, reading: Reading, count: int, cpus: float) -> None:
        import ray

        actor = ray.remote(CropWorker).options(
            num_cpus=cpus, max_restarts=-1, max_task_retries=reading.attempts, scheduling_strategy="SPREAD"
        )
        self._actors = itertools.cycle([actor.remote(listing, reading) for _ in range(count)])
        self.count = count

    def crops(self, *arguments: Any) -> Any:
        """Reference of CropWorker.crops' result."""
        return next(self._actors).crops.remote(*arguments)

    def views(self, *arguments: Any) -> Any:
        """Reference of CropWorker.views' result."""
        return next(self._actors).views.remote(*arguments)


class Batches:
    """This process's share of every batch; some batches are made ahead.

    images: of the listing. multicrop_of: epoch -> how crops are made in it.
    """

    def __init__(
        self,
        workers: CropWorkers,
        images: int,
        batch_size: int,
        seed: int,
        multicrop_of: Callable[[int], MultiCrop],
        *,
        rank: int,
        processes: int,
    ) -> None:
        self._workers, self._images, self._batch_size = workers, images, batch_size
        self._seed, self._multicrop_of = seed, multicrop_of
        self._share = batch_size // processes
        self._first_of_share = rank * self._share
        self._steps_per_epoch = images // batch_size
        self._order: tuple[int, Any] = (-1, None)

    def between(self, first_step: int, end_step: int) -> Iterator[tuple[Crops, list[BadImage]]]:
        """Batches by number. Raises JobError where images cannot be read."""
        asked: deque[list[Any]] = deque()
        step = first_step
        with ThreadPoolExecutor(1) as pool:
            coming = None
            while True:
                while step < end_step and len(asked) < BATCHES_AHEAD:
                    asked.append(self._ask(step))
                    step += 1
                following = pool.submit(_collect, asked.popleft()) if asked else None
                if coming is not None:
                    yield coming.result()
                if following is None:
                    return
                coming = following

    def _ask(self, step: int) -> list[Any]:
        """Have a batch made, in pieces by several workers."""
        epoch, number = divmod(step, self._steps_per_epoch)
        begin = number * self._batch_size + self._first_of_share
        pieces = min(self._share, max(self._workers.count, round(self._share / IMAGES_A_PIECE)))
        edges = np.linspace(begin, begin + self._share, pieces + 1).round().astype(int)
        order, crops = self._order_of(epoch), self._multicrop_of(epoch)
        return [self._workers.crops(order, range(int(a), int(b)), epoch, crops) for a, b in itertools.pairwise(edges)]

    def _order_of(self, epoch: int) -> Any:
        import ray

        if self._order[0] != epoch:
            self._order = epoch, ray.put(epoch_order(self._images, self._seed, epoch))
        return self._order[1]


def _collect(references: list[Any]) -> tuple[Crops, list[BadImage]]:
    """A batch out of its pieces; the copy makes it this process's own."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        parts = ray.get(references)
    except RayTaskError as error:
        raise explain_ray_error(error, "the reading of images") from None
    whole = np.concatenate([crops.whole for crops, _ in parts], axis=1)
    local = np.concatenate([crops.local for crops, _ in parts], axis=1)
    return Crops(whole, local), [one for _, bad in parts for one in bad]
