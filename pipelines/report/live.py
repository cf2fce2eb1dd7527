"""What the live view needs: every patch's descriptor in a few bytes, the colour scale, and where it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dino_ops.compact_descriptors import compact_descriptors, cosines, region_query
from dino_ops.nearest import unit
from pipelines.report.patches import ImagePatches
from pipelines.settings.sections import ReportSettings

# The scale and the agreement are measured on these.
MEASURED_PATCHES = 128
# The first is taken over all patches, the second over the best patch of each image.
UNRELATED_PERCENTILE, RELATED_PERCENTILE = 50, 95
# The browser's loop takes this many at a time, so codes are padded to a multiple.
DIMENSIONS_PER_LOOP_STEP = 8


@dataclass(frozen=True)
class Live:
    """The patches of several images one after another, each image's in raster order.

    codes: (n, d) int8, zeros for a patch that is not stored; d is a multiple of 8. firsts: the first patch of each
    image, and n at the end. kept: see CompactDescriptors. low, high: the cosines at the ends of the colour scale: that
    of patches that have nothing to do with each other, and that of good matches. agreement: the share of best matches
    that the full descriptors give, too. one_off: the share that is at most one patch away from theirs. loss: by how
    much less similar the matches are, by the full descriptors, on average. These three are None with fewer than two
    images. start: (image, row, column) to begin with.
    """

    image_ids: list[str]
    grids: list[tuple[int, int]]
    codes: np.ndarray
    firsts: np.ndarray
    kept: float
    low: float
    high: float
    agreement: float | None
    one_off: float | None
    loss: float | None
    start: tuple[int, int, int]

    def of(self, image: int) -> np.ndarray:
        """The codes of an image."""
        return self.codes[self.firsts[image] : self.firsts[image + 1]]


def make_live(
    patches: Mapping[str, ImagePatches], labels: Mapping[str, str | None], settings: ReportSettings
) -> Live | None:
    """The live view of some images, by image_id; None where no patch is stored.

    Those of the label that it begins with come first, the others in the order of `labels`.
    """
    ids = [one for one in labels if one in patches]
    there = np.concatenate([patches[one].stored.reshape(-1) for one in ids]) if ids else np.zeros(0, bool)
    if not there.any():
        return None
    stacked = np.concatenate([patches[one].descriptor.reshape(patches[one].stored.size, -1) for one in ids])
    compact = compact_descriptors(stacked[there], settings.dimensions, settings.seed)
    width = -(-compact.codes.shape[1] // DIMENSIONS_PER_LOOP_STEP) * DIMENSIONS_PER_LOOP_STEP
    codes = np.zeros((len(stacked), width), np.int8)
    codes[there, : compact.codes.shape[1]] = compact.codes

    ends = np.cumsum([patches[one].stored.size for one in ids])
    began, row, column = _start(
        codes, np.array([0, *ends]), [patches[one] for one in ids], [labels[one] for one in ids]
    )
    first = ids[began]
    alike = [labels[first] is not None and labels[one] == labels[first] for one in ids]
    order = sorted(range(len(ids)), key=lambda at: (at != began, not alike[at], at))
    ids = [ids[at] for at in order]
    rows = np.concatenate([np.arange(ends[at - 1] if at else 0, ends[at]) for at in order])
    codes, stacked, there = codes[rows], stacked[rows], there[rows]
    grids = [(patches[one].stored.shape[0], patches[one].stored.shape[1]) for one in ids]
    firsts = np.concatenate([[0], np.cumsum([patches[one].stored.size for one in ids])])
    measured = _measure(codes, stacked, firsts, there, grids, settings.seed)
    return Live(ids, grids, codes, firsts, compact.kept, *measured, (0, row, column))


def _measure(
    codes: np.ndarray,
    full: np.ndarray,
    firsts: np.ndarray,
    there: np.ndarray,
    grids: Sequence[tuple[int, int]],
    seed: int,
) -> tuple[float, float, float | None, float | None, float | None]:
    """(low, high, agreement, one_off, loss) as Live has them, on a sample of patches."""
    image_of = np.repeat(np.arange(len(grids)), np.diff(firsts))
    drawn = np.flatnonzero(there)
    drawn = np.random.default_rng(seed).choice(drawn, min(MEASURED_PATCHES, len(drawn)), replace=False)
    images = [at for at in range(len(grids)) if there[firsts[at] : firsts[at + 1]].any()]
    similar = np.stack([cosines(codes, region_query(codes[[at]])) for at in drawn])
    if len(images) < 2:
        low = float(np.percentile(similar[:, there], UNRELATED_PERCENTILE))
        return low, 1.0, None, None, None
    exact = _exact(full, drawn)
    similar[:, ~there] = exact[:, ~there] = -np.inf
    others, bests, same, near, losses = [], [], [], [], []
    for at, row, exact_row in zip(drawn, similar, exact, strict=True):
        others.append(row[there & (image_of != image_of[at])])
        for image in images:
            if image == image_of[at]:
                continue
            own = slice(firsts[image], firsts[image + 1])
            found, right = int(row[own].argmax()), int(exact_row[own].argmax())
            bests.append(row[own][found])
            same.append(found == right)
            losses.append(exact_row[own][right] - exact_row[own][found])
            columns = grids[image][1]
            apart = np.abs(np.subtract(divmod(found, columns), divmod(right, columns)))
            near.append(apart.max() <= 1)
    low, high = (
        float(np.percentile(np.concatenate(others), UNRELATED_PERCENTILE)),
        float(np.percentile(bests, RELATED_PERCENTILE)),
    )
    return low, max(high, low + 0.01), float(np.mean(same)), float(np.mean(near)), float(np.mean(losses))


def _exact(full: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Cosines of some patches' descriptors with all, as stored."""
    queries = unit(full[drawn].astype(np.float32))
    found = np.empty((len(drawn), len(full)), np.float32)
    for start in range(0, len(full), 16_384):
        part = full[start : start + 16_384].astype(np.float32)
        found[:, start : start + len(part)] = queries @ unit(part).T
    return found


def _start(
    codes: np.ndarray, firsts: np.ndarray, maps: Sequence[ImagePatches], labels: Sequence[str | None]
) -> tuple[int, int, int]:
    """A patch that shows well what the view does: salient, and with good matches, in images of its label if it has one.

    Only the most salient patch of every image is looked at. A patch counts as as salient as the mean of it and its
    neighbours, since models have single patches that stand out and show nothing.
    """
    best, chosen = -np.inf, (0, 0, 0)
    for at, one in enumerate(maps):
        if not one.stored.any():
            continue
        row, column = np.unravel_index(np.where(one.stored, _interest(one), -np.inf).argmax(), one.stored.shape)
        own = firsts[at] + row * one.stored.shape[1] + column
        similar = cosines(codes, region_query(codes[[own]]))
        others = [number for number in range(len(maps)) if number != at]
        tops = {number: float(similar[firsts[number] : firsts[number + 1]].max()) for number in others}
        alike = [top for number, top in tops.items() if labels[at] is not None and labels[number] == labels[at]]
        rest = [top for number, top in tops.items() if labels[at] is None or labels[number] != labels[at]]
        ranked = sorted(tops.values(), reverse=True)
        value = float(np.mean(ranked[: max(1, len(ranked) // 4)])) if ranked else 0.0
        if alike and rest:
            value = float(np.mean(alike) - np.mean(rest))
        if value > best:
            best, chosen = value, (at, int(row), int(column))
    return chosen


def _interest(one: ImagePatches) -> np.ndarray:
    """(gh, gw): mean saliency of each patch and its neighbours; without saliency, how near it is to the middle."""
    if one.saliency is None:
        row, column = np.indices(one.stored.shape)
        return -np.hypot(row - one.stored.shape[0] / 2, column - one.stored.shape[1] / 2)
    rows, columns = (slice(first, None, one.step) for first in one.origin)
    padded = np.pad(np.nan_to_num(one.saliency[rows, columns]), 1)
    height, width = one.stored.shape
    return np.mean([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
