"""Part co-segmentation: parts of the common object that are the same in all images of a set.

"Deep ViT Features as Dense Visual Descriptors", section 4.2: descriptors of the foreground are clustered again, and a
dense CRF brings the parts to the image's edges. With three stages, parts that not every image has are taken for
background and the others are clustered once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from dino_ops.cosegmentation import DEFAULT_KMEANS, ForegroundModel, check_settings, foreground_patches, sample_rows
from dino_ops.dense_crf import Backend, crf_labels
from dino_ops.published_kmeans import KMeansFunction, cluster_by_elbow, squared_distances, unit_rows

BACKGROUND = -1


@dataclass(frozen=True)
class PartModel:
    """Parts of the foreground of a set of images.

    centroids: (parts, D) float32. background: (b, D) float32, centroids of what is no part; none where all of the set
    is foreground. notes: what was unusual, in words, those of the foreground included.
    """

    centroids: np.ndarray
    background: np.ndarray
    notes: tuple[str, ...] = ()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, as np.savez takes them."""
        return {
            "centroids": self.centroids,
            "background": self.background,
            "notes": np.array(self.notes, dtype=np.str_),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PartModel:
        """The model that to_arrays took apart."""
        return cls(arrays["centroids"], arrays["background"], tuple(arrays["notes"].tolist()))


def fit_parts(
    foreground: ForegroundModel,
    descriptors: Sequence[np.ndarray],
    *,
    num_parts: int = 4,
    sample_interval: int = 100,
    kmeans: KMeansFunction = DEFAULT_KMEANS,
) -> PartModel:
    """Parts of the foreground in two stages: its descriptors clustered into num_parts.

    foreground, descriptors, sample_interval, kmeans: as fit_foreground takes and gives them; k-means sees every
    sample_interval-th of the patches that are foreground, in each image. Fewer of those than num_parts make fewer
    parts, and without foreground there are none.
    """
    check_settings(sample_interval=sample_interval)
    kept = [foreground_patches(foreground, descriptor) for descriptor in descriptors]
    training = sample_rows(descriptors, sample_interval, kept)
    return _cluster_parts(
        training, foreground.centroids[~foreground.salient], num_parts, kmeans, _notes(foreground, kept)
    )


def fit_common_parts(
    foreground: ForegroundModel,
    descriptors: Sequence[np.ndarray],
    pixels: Sequence[np.ndarray] | None,
    originals: Sequence[bool] | None = None,
    *,
    num_parts: int = 4,
    elbow_second_stage: float = 0.94,
    sample_interval: int = 100,
    kmeans: KMeansFunction = DEFAULT_KMEANS,
    crf: Backend = "auto",
) -> PartModel:
    """Parts of the foreground in three stages; the second finds out which parts every image has.

    pixels: for each descriptor map the image (H, W, 3) uint8 as the model saw it, along whose edges the second
    stage's parts are smoothed; None leaves them as they are. originals: which maps are of images of the set, and not
    of crops that only join the clustering; by default all. elbow_second_stage: chooses the second stage's number of
    parts, see `cluster_by_elbow`. crf: see `crf_labels`. The rest is as in fit_parts.

    A part is common when every image that has any part has this one. Without common parts there are none.
    """
    check_settings(elbow=elbow_second_stage, sample_interval=sample_interval)
    kept = [foreground_patches(foreground, descriptor) for descriptor in descriptors]
    training = sample_rows(descriptors, sample_interval, kept)
    not_salient, notes = foreground.centroids[~foreground.salient], _notes(foreground, kept)
    if len(training) == 0:
        return _cluster_parts(training, not_salient, num_parts, kmeans, notes)

    second = cluster_by_elbow(training, _Chosen(descriptors, kept), elbow_second_stage, kmeans)
    candidates = PartModel(second.centroids, not_salient)
    labels = []
    for number, descriptor in enumerate(descriptors):
        if pixels is None:
            labels.append(nearest_parts(candidates, descriptor))
        else:
            smooth = smooth_parts(candidates, descriptor, pixels[number], crf)
            labels.append(parts_of_patches(smooth, descriptor.shape[:2]))
    voting = labels if originals is None else [one for one, votes in zip(labels, originals, strict=True) if votes]
    common = _in_every_image(voting, len(second.centroids))

    kept = [np.isin(image_labels, np.flatnonzero(common)) for image_labels in labels]
    training = sample_rows(descriptors, sample_interval, kept)
    background = np.concatenate([not_salient, second.centroids[~common]])
    if not common.any():
        notes = (*notes, f"none of {len(common)} parts is in every image, so there are no parts")
    return _cluster_parts(training, background, num_parts, kmeans, notes)


def part_distances(model: PartModel, descriptor: np.ndarray) -> np.ndarray:
    """How far each patch is from each part, and from the background: (parts + 1 or parts, grid height, grid width).

    descriptor: (grid height, grid width, D). Squared distances, float32, to the centroids of parts and, last, to the
    nearest centroid of the background where there is any.
    """
    rows = unit_rows(descriptor)
    distances = [squared_distances(rows, model.centroids).T]
    if len(model.background):
        distances.append(squared_distances(rows, model.background).min(axis=1)[None])
    return np.concatenate(distances).reshape(-1, *descriptor.shape[:2])


def nearest_parts(model: PartModel, descriptor: np.ndarray) -> np.ndarray:
    """The part of each patch of an image, not smoothed: the grid of descriptor, int32, -1 for background."""
    if len(model.centroids) == 0:
        return np.full(descriptor.shape[:2], BACKGROUND, np.int32)
    return _background_last(part_distances(model, descriptor).argmin(axis=0), model)


def smooth_parts(model: PartModel, descriptor: np.ndarray, rgb: np.ndarray, crf: Backend = "auto") -> np.ndarray:
    """The part of each pixel of an image, along the image's edges: (H, W) int32, -1 for background.

    descriptor: (grid height, grid width, D). rgb: (H, W, 3) uint8, the image as the model saw it. crf: see crf_labels.
    """
    height, width = rgb.shape[:2]
    if len(model.centroids) == 0:
        return np.full((height, width), BACKGROUND, np.int32)
    energies = part_distances(model, descriptor)
    rows, columns = _nearest(energies.shape[1], height), _nearest(energies.shape[2], width)
    return _background_last(crf_labels(energies[:, rows[:, None], columns], rgb, backend=crf), model)


def parts_of_patches(labels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Labels of pixels (H, W) at a grid (height, width) of patches, each taking the label at its first pixel."""
    return labels[_nearest(labels.shape[0], grid[0])[:, None], _nearest(labels.shape[1], grid[1])]


class _Chosen(Sequence[np.ndarray]):
    """The descriptors of chosen patches, (n, D) of each image, taken when asked."""

    def __init__(self, descriptors: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> None:
        self._descriptors, self._kept = descriptors, kept

    def __len__(self) -> int:
        return len(self._descriptors)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> _Chosen: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | _Chosen:
        if isinstance(index, slice):
            return _Chosen(self._descriptors[index], self._kept[index])
        return self._descriptors[index][self._kept[index]]


def _cluster_parts(
    training: np.ndarray, background: np.ndarray, num_parts: int, kmeans: KMeansFunction, notes: tuple[str, ...]
) -> PartModel:
    if num_parts < 1:
        raise ValueError(f"num_parts is at least 1, not {num_parts}")
    if len(training) == 0:
        return PartModel(np.zeros((0, background.shape[1]), np.float32), background, notes)
    if len(training) < num_parts:
        notes = (*notes, f"only {len(training)} descriptors to cluster, so as many parts instead of {num_parts}")
    return PartModel(kmeans(training, min(num_parts, len(training))), background, notes)


def _notes(foreground: ForegroundModel, kept: Sequence[np.ndarray]) -> tuple[str, ...]:
    if foreground.salient.any() and not any(mask.any() for mask in kept):
        return (*foreground.notes, "no patch of these images is foreground, so there are no parts")
    return foreground.notes


def _in_every_image(labels: Sequence[np.ndarray], parts: int) -> np.ndarray:
    """Which parts every image has, images without any part aside: (parts,) bool; none where no image has any."""
    present = np.array([np.isin(np.arange(parts), image_labels) for image_labels in labels]).reshape(-1, parts)
    showing = present[present.any(axis=1)]
    return np.logical_and.reduce(showing, axis=0) & (len(showing) > 0)


def _background_last(labels: np.ndarray, model: PartModel) -> np.ndarray:
    """Labels of part_distances as parts: the last one, after all parts, is background."""
    return np.where(labels < len(model.centroids), labels, BACKGROUND).astype(np.int32)


def _nearest(size_from: int, size_to: int) -> np.ndarray:
    """For each of size_to places the nearest of size_from, as torch's mode "nearest" rounds: (size_to,) int64."""
    places = np.arange(size_to, dtype=np.float32) * np.float32(size_from / size_to)
    return np.minimum(places.astype(np.int64), size_from - 1)
