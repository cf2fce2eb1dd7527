"""The report's colours: for amounts, kinds and descriptors, also for people who do not see all colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dino_ops.nearest import unit
from dino_ops.pca import fit_pca

# Of viridis (CC0), whose lightness rises evenly; what lies between is interpolated.
_AMOUNTS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
# Paul Tol's "muted": nine kinds.
KINDS = ("332288", "88ccee", "44aa99", "117733", "999933", "ddcc77", "cc6677", "882255", "aa4499")
OTHER_KIND = "c4c4c4"
# Okabe and Ito's, as cosegment_export has them for parts.
PARTS = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")
# Bright on photographs: for lines between two of them.
LINES = ("e69f00", "56b4e9", "00c48c", "f0e442", "3d9be9", "ff7a1a", "ff9bd2", "ffffff", "b8f36d", "c9a6ff")

# The alpha, of 255, with which the least of an amount covers the photo below.
FAINT = 140

MAX_PCA_ROWS = 100_000
# Patches at either end of the range that may all look alike, too bright or too dark.
_CLIPPED_PER_CENT = 1.0


def rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour)
    return red, green, blue


def amounts(values: np.ndarray) -> np.ndarray:
    """Values 0..1 as viridis: (..., 3) uint8. Others are clipped; NaN is as 0."""
    anchors = np.array([rgb(colour) for colour in _AMOUNTS], np.float64)
    at = np.clip(np.nan_to_num(values), 0, 1) * (len(anchors) - 1)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def amounts_over(values: np.ndarray) -> np.ndarray:
    """The same with alpha, to lie over a photo: (..., 4) uint8. What is little covers less; NaN covers nothing."""
    share = np.clip(np.nan_to_num(values), 0, 1)
    alpha = np.where(np.isnan(values), 0, FAINT + np.floor((255 - FAINT) * share + 0.5)).astype(np.uint8)
    return np.concatenate([amounts(values), alpha[..., None]], axis=-1)


def amount_table() -> list[str]:
    """The 256 colours that a byte stands for, as RRGGBB."""
    return [bytes(colour).hex() for colour in amounts(np.arange(256) / 255)]


def descriptor_colours(maps: Sequence[np.ndarray], stored: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Colours of descriptor maps (gh, gw, D), the same for like patches in all of them: each (gh, gw, 3) uint8.

    Four principal components of the directions of all stored patches together; the first mostly tells an object from
    its surroundings, the other three become red, green and blue, each stretched once for all images. Where there are
    fewer components, the colours that they lack are grey. stored: (gh, gw), which patches there are; the others are
    black.
    """
    directions = [unit(one[there].astype(np.float32)) for one, there in zip(maps, stored, strict=True)]
    if not sum(len(one) for one in directions):
        return [np.zeros((*there.shape, 3), np.uint8) for there in stored]
    rows = np.concatenate(directions)
    pca = fit_pca(rows, min(4, *rows.shape), seed, max_rows=MAX_PCA_ROWS)
    channels = pca.transform(rows)[:, 1:]
    low, high = np.percentile(channels, (_CLIPPED_PER_CENT, 100 - _CLIPPED_PER_CENT), axis=0)
    span = np.where(high > low, high - low, 1)
    coloured = []
    for own, there in zip(directions, stored, strict=True):
        drawn = np.zeros((*there.shape, 3), np.uint8)
        drawn[there] = 127
        values = np.clip((pca.transform(own)[:, 1:] - low) / span, 0, 1)
        drawn[there, : values.shape[1]] = np.rint(values * 255)
        coloured.append(drawn)
    return coloured
