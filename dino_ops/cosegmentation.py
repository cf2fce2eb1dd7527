"""Co-segmentation: what the images of a set have in common, as opposed to their backgrounds.

"Deep ViT Features as Dense Visual Descriptors", section 4.2: all patches of the set are clustered, and the images vote
with their saliency for the clusters that are foreground. Fitting and assigning are apart, so that a large set can be
fitted on some of its images. mask_refinement.py brings masks of patches to masks of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dino_ops.published_kmeans import FaissKMeans, KMeansFunction, cluster_by_elbow, nearest_centroids, unit_rows

Voting = Literal["published", "relative"]

DEFAULT_KMEANS = FaissKMeans()


@dataclass(frozen=True)
class ForegroundModel:
    """Clusters of the patches of a set of images, and which of them are foreground.

    centroids: (k, D) float32, of descriptors of unit length. votes: (k,) int64, images in which the cluster is
    salient; salient: (k,) bool, whether they are enough. voters: images that could vote, whichever clusters they have.
    objectives: (k,) float64, the mean squared distance with 1 to k clusters.
    notes: what was unusual, in words; a model without patches or without salient clusters has no foreground.
    """

    centroids: np.ndarray
    votes: np.ndarray
    salient: np.ndarray
    voters: int
    objectives: np.ndarray
    notes: tuple[str, ...] = ()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, as np.savez takes them."""
        return {
            "centroids": self.centroids,
            "votes": self.votes,
            "salient": self.salient,
            "voters": np.array(self.voters),
            "objectives": self.objectives,
            "notes": np.array(self.notes, dtype=np.str_),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ForegroundModel:
        """The model that to_arrays took apart."""
        return cls(
            centroids=arrays["centroids"],
            votes=arrays["votes"],
            salient=arrays["salient"],
            voters=int(arrays["voters"]),
            objectives=arrays["objectives"],
            notes=tuple(arrays["notes"].tolist()),
        )


def fit_foreground(
    descriptors: Sequence[np.ndarray],
    saliency: Sequence[np.ndarray | None],
    *,
    elbow: float = 0.975,
    votes_percentage: float = 75,
    saliency_threshold: float = 0.065,
    sample_interval: int = 100,
    voting: Voting = "published",
    kmeans: KMeansFunction = DEFAULT_KMEANS,
) -> ForegroundModel:
    """Cluster the patches of a set of images and let the images vote for the clusters that are foreground.

    descriptors: maps (grid height, grid width, D) of any floating-point type. They are read again for each number
    of clusters tried, and only the sample is held, so the sequence may load them when asked.
    saliency: for each of them (grid height, grid width), 0..1, or None for one that joins the clustering without a
    vote, such as a crop. Images that are outliers (see `inliers`) are left out of both.

    elbow: see `cluster_by_elbow`. sample_interval: k-means sees every sample_interval-th patch of each image, from
    the first. kmeans: by default the published code's. voting: "published", an image votes for a cluster when the mean
    saliency of its patches there is above saliency_threshold, and a cluster needs the votes of votes_percentage of the
    voting images. "relative" needs neither setting: an image votes when that mean is above the image's own, and a
    cluster needs half of the images that have it. What is found then depends much less on the sample and the seed.

    Raises ValueError for maps that do not fit together and for settings out of range.
    """
    check_settings(elbow=elbow, votes_percentage=votes_percentage, sample_interval=sample_interval)
    if voting not in get_args(Voting):
        raise ValueError(f"voting is published or relative, not {voting!r}")
    _check_maps(descriptors, saliency)
    voters = sum(one is not None for one in saliency)
    training = sample_rows(descriptors, sample_interval)
    if len(training) == 0:
        return _nothing(training.shape[1], voters, "there are no patches to cluster")

    found = cluster_by_elbow(training, descriptors, elbow, kmeans)
    k = len(found.centroids)
    votes, images = np.zeros(k, np.int64), np.zeros(k, np.int64)
    for descriptor, image_saliency in zip(descriptors, saliency, strict=True):
        if image_saliency is not None:
            labels, _ = nearest_centroids(unit_rows(descriptor), found.centroids)
            means = mean_saliency(labels, image_saliency, k)
            votes += means > (saliency_threshold if voting == "published" else _own_mean(image_saliency))
            images += np.isfinite(means)
    if voting == "published":
        needed = np.full(k, math.ceil(voters * votes_percentage / 100))
    else:
        needed = np.maximum((images + 1) // 2, 1)
    salient = (votes >= needed) & (voters > 0)
    return ForegroundModel(
        centroids=found.centroids,
        votes=votes,
        salient=salient,
        voters=voters,
        objectives=found.objectives,
        notes=tuple(filter(None, [found.note, _about_votes(votes, needed, salient, voters)])),
    )


def assign_clusters(model: ForegroundModel, descriptor: np.ndarray) -> np.ndarray:
    """The cluster of each patch of an image: descriptor (grid height, grid width, D) -> the grid, int32.

    -1 for every patch when the model has no clusters. The image need not be one that the model was fitted on.
    """
    grid = descriptor.shape[:2]
    if len(model.centroids) == 0:
        return np.full(grid, -1, np.int32)
    return nearest_centroids(unit_rows(descriptor), model.centroids)[0].reshape(grid)


def foreground_patches(model: ForegroundModel, descriptor: np.ndarray) -> np.ndarray:
    """Which patches of an image lie in salient clusters: descriptor (grid height, grid width, D) -> the grid, bool."""
    if not model.salient.any():
        return np.zeros(descriptor.shape[:2], bool)
    return model.salient[assign_clusters(model, descriptor)]


def inliers(class_descriptors: np.ndarray, threshold: float = 0.7, mean: np.ndarray | None = None) -> np.ndarray:
    """Which images are like the others of their set: (n,) bool, by the cosine to the mean of all class descriptors.

    class_descriptors: (n, D), one vector of each image, such as its class token. mean: (D,) of the images that a model
    was fitted on, to judge further ones; by default that of class_descriptors.

    The published code takes the class token's descriptor of the same layer and facet as the patches'. It leaves
    outliers out of the clustering and the vote and gives them empty masks; so should callers.
    """
    if len(class_descriptors) == 0:
        return np.zeros(0, bool)
    vectors = np.asarray(class_descriptors, np.float64)
    centre = vectors.mean(axis=0) if mean is None else np.asarray(mean, np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(centre)
    return vectors @ centre / np.maximum(lengths, 1e-8) >= threshold


def mean_saliency(labels: np.ndarray, saliency: np.ndarray, k: int) -> np.ndarray:
    """The mean saliency of an image's patches in each of k clusters, -inf where it has none: (k,) float64."""
    patches = np.bincount(labels.ravel(), minlength=k)
    sums = np.bincount(labels.ravel(), np.asarray(saliency, np.float64).ravel(), minlength=k)
    return np.where(patches > 0, sums / np.maximum(patches, 1), -np.inf)


def sample_rows(
    descriptors: Sequence[np.ndarray], interval: int, kept: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Every interval-th descriptor of each image, from its first, at unit length: (n, D) float32.

    kept: for each image the patches that count, (grid height, grid width) bool; by default all.
    """
    samples = []
    for number, descriptor in enumerate(descriptors):
        rows = descriptor.reshape(-1, descriptor.shape[-1])
        if kept is not None:
            rows = rows[kept[number].ravel()]
        samples.append(unit_rows(rows[::interval]))
    return np.concatenate(samples) if samples else np.zeros((0, 0), np.float32)


def check_settings(*, elbow: float = 1, votes_percentage: float = 100, sample_interval: int = 1) -> None:
    """Raises ValueError for the first setting that is out of range."""
    if not 0 < elbow <= 1:
        raise ValueError(f"elbow is above 0 and at most 1, not {elbow}")
    if not 0 < votes_percentage <= 100:
        raise ValueError(f"votes_percentage is above 0 and at most 100, not {votes_percentage}")
    if sample_interval < 1:
        raise ValueError(f"sample_interval is at least 1, not {sample_interval}")


def _check_maps(descriptors: Sequence[np.ndarray], saliency: Sequence[np.ndarray | None]) -> None:
    if len(descriptors) != len(saliency):
        raise ValueError(f"{len(descriptors)} descriptor maps with {len(saliency)} saliency maps")
    channels = set()
    for number, (descriptor, image_saliency) in enumerate(zip(descriptors, saliency, strict=True)):
        if descriptor.ndim != 3:
            raise ValueError(f"descriptor map {number} is (grid height, grid width, D), not {descriptor.shape}")
        if image_saliency is not None and image_saliency.shape != descriptor.shape[:2]:
            raise ValueError(
                f"image {number} has {descriptor.shape[0]} x {descriptor.shape[1]} descriptors, "
                f"but saliency of shape {image_saliency.shape}"
            )
        channels.add(descriptor.shape[2])
    if len(channels) > 1:
        raise ValueError(f"descriptors of one set have one length, not {sorted(channels)}")


def _own_mean(saliency: np.ndarray) -> float:
    """An image's mean saliency, and a little more: a cluster that is all of the image is not above it by rounding."""
    return float(np.mean(saliency, dtype=np.float64)) + 1e-9


def _nothing(dimension: int, voters: int, note: str) -> ForegroundModel:
    return ForegroundModel(
        centroids=np.zeros((0, dimension), np.float32),
        votes=np.zeros(0, np.int64),
        salient=np.zeros(0, bool),
        voters=voters,
        objectives=np.zeros(0),
        notes=(note,),
    )


def _about_votes(votes: np.ndarray, needed: np.ndarray, salient: np.ndarray, voters: int) -> str:
    if voters == 0:
        return "no image can vote, so there is no foreground"
    if not salient.any():
        best = int(np.argmax(votes - needed))
        return (
            f"no salient cluster: the best of {len(votes)} has the votes of {votes[best]} of {voters} images, "
            f"{needed[best]} are needed, so there is no foreground"
        )
    if salient.all():
        return f"every one of the {len(votes)} clusters is salient, so there is no background"
    return ""
