"""Annotated key points of image pairs, in the layouts that PF-WILLOW and SPair-71k are distributed in.

Nothing is extracted from the annotations' images: they name the images of a store.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.errors import RequestError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
READS_AT_ONCE = 16
# SciPy numbers the versions 5 to 7 like this; 2 is 7.3, which is HDF5.
NEWEST_MATLAB_FORMAT = 1


@dataclass(frozen=True)
class AnnotatedPair:
    """Two images and points that mean the same in both.

    source, target: CLASS/NAME, what the image_id of the image ends with. source_xy, target_xy: (n, 2) float64, pixels
    of the original images, x first; n is at least 1. target_box_xyxy: the annotated object, where there is one. Sizes:
    pixels of the annotated images, where the annotations say.
    """

    category: str
    source: str
    target: str
    source_xy: np.ndarray
    target_xy: np.ndarray
    target_box_xyxy: tuple[float, float, float, float] | None = None
    source_size_wh: tuple[int, int] | None = None
    target_size_wh: tuple[int, int] | None = None


@dataclass(frozen=True)
class Annotations:
    """The pairs of a data set, and which layout they were in: pf-willow or spair-71k."""

    layout: str
    pairs: list[AnnotatedPair]

    @property
    def images(self) -> list[str]:
        return sorted({name for pair in self.pairs for name in (pair.source, pair.target)})


def read_annotations(uri: str, split: str, options: storage.Options) -> Annotations:
    """The annotations in a folder or prefix.

    SPair-71k: PairAnnotation/SPLIT/*.json. PF-WILLOW: CLASS/*.mat beside images of the same name; every ordered pair
    of a class counts.

    Raises:
        RequestError: there are none, or a file is not what it should be.
        JobError: the storage cannot be reached.
    """
    fs, root = storage.filesystem(storage.normalise(uri), options)
    try:
        with storage.reaching(uri):
            return _read_layout(fs, root.rstrip("/"), uri, split)
    except OSError as error:
        raise RequestError(f"The annotations in {uri} cannot be read: {error}.") from None


def _read_layout(fs: Any, root: str, uri: str, split: str) -> Annotations:
    if not fs.isdir(root):
        raise RequestError(f"There is no folder {uri} with annotations.")
    if fs.isdir(f"{root}/PairAnnotation"):
        files = sorted(name for name in fs.find(f"{root}/PairAnnotation/{split}") if name.endswith(".json"))
        if not files:
            raise RequestError(f"{uri}/PairAnnotation holds no .json for split {split!r} (evaluate.split).")
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:  # SPair-71k has 12,234 files to test with
            contents = pool.map(fs.cat_file, files)
            return Annotations("spair-71k", [_spair_pair(*each) for each in zip(files, contents, strict=True)])
    pairs = list(_willow_pairs(fs, root))
    if not pairs:
        raise RequestError(
            f"{uri} holds no annotations: neither CLASS/*.mat as PF-WILLOW does, nor PairAnnotation/{split}/*.json as "
            "SPair-71k does."
        )
    return Annotations("pf-willow", pairs)


def _spair_pair(name: str, data: bytes) -> AnnotatedPair:
    try:
        content = json.loads(data)
        category = str(content["category"])
        source_xy, target_xy = (np.array(content[key], np.float64) for key in ("src_kps", "trg_kps"))
        x0, y0, x1, y1 = (float(side) for side in content["trg_bndbox"])
        source, target = (f"{category}/{content[key]}" for key in ("src_imname", "trg_imname"))
        source_size, target_size = (_size_wh(content.get(key)) for key in ("src_imsize", "trg_imsize"))
    except KeyError as error:
        raise RequestError(f"{name} is not an annotation of a pair: it lacks {error.args[0]}.") from None
    except (ValueError, TypeError, IndexError) as error:
        raise RequestError(f"{name} is not an annotation of a pair: {error}.") from None
    _check_points(name, source_xy, target_xy)
    box = (x0, y0, x1, y1)
    return AnnotatedPair(category, source, target, source_xy, target_xy, box, source_size, target_size)


def _size_wh(size: Any) -> tuple[int, int] | None:
    """SPair-71k writes width, height, channels."""
    return None if size is None else (int(size[0]), int(size[1]))


def _willow_pairs(fs: Any, root: str) -> Iterator[AnnotatedPair]:
    """All ordered pairs within each class."""
    names = [name for name in sorted(fs.find(root, maxdepth=2)) if name.removeprefix(f"{root}/").count("/") == 1]
    image_of = {name.rpartition(".")[0]: name for name in names if name.lower().endswith(IMAGE_ENDINGS)}
    points_by_class: dict[str, dict[str, np.ndarray]] = {}
    for name in names:
        if not name.endswith(".mat"):
            continue
        image = image_of.get(name.removesuffix(".mat"))
        if image is None:
            raise RequestError(f"{name} has no image of the same name beside it ({', '.join(IMAGE_ENDINGS)}).")
        category, _, file = image.removeprefix(f"{root}/").partition("/")
        points_by_class.setdefault(category, {})[f"{category}/{file}"] = _willow_points(fs, name)
    for category, of_image in points_by_class.items():
        for source, target in itertools.permutations(of_image, 2):
            _check_points(f"{source} to {target}", of_image[source], of_image[target])
            yield AnnotatedPair(category, source, target, of_image[source], of_image[target])


def _willow_points(fs: Any, name: str) -> np.ndarray:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError, matfile_version

    data = fs.cat_file(name)
    try:
        if matfile_version(io.BytesIO(data))[0] > NEWEST_MATLAB_FORMAT:
            raise RequestError(f"{name} is a MATLAB 7.3 file, which is not read here: save it with `-v7`.")
        content = loadmat(io.BytesIO(data), variable_names=["pts_coord"])
    except (MatReadError, ValueError, TypeError) as error:
        raise RequestError(f"{name} cannot be read as a MATLAB file: {error}.") from None
    if "pts_coord" not in content:
        raise RequestError(f"{name} holds no key points: it lacks pts_coord.")
    points = np.asarray(content["pts_coord"], np.float64)
    if points.ndim != 2 or len(points) != 2:
        raise RequestError(f"{name} holds pts_coord of shape {points.shape}, not two rows: x and y.")
    return points.T


def _check_points(name: str, source_xy: np.ndarray, target_xy: np.ndarray) -> None:
    shapes = {source_xy.shape, target_xy.shape}
    if len(shapes) > 1 or source_xy.ndim != 2 or source_xy.shape[1] != 2 or not len(source_xy):
        raise RequestError(
            f"{name}: both images of a pair need the same key points (x, y), at least one; there are arrays of shape "
            f"{source_xy.shape} and {target_xy.shape}."
        )
    if not (np.isfinite(source_xy).all() and np.isfinite(target_xy).all()):
        raise RequestError(f"{name}: a key point is not a finite number.")
