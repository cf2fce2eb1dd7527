"""What is laid over the photos: one layer for saliency, descriptors as colours, each clustering and each parts/NAME."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipelines.errors import counted
from pipelines.report.clusterings import Clustering
from pipelines.report.colours import KINDS, OTHER_KIND, PARTS, amounts_over, descriptor_colours, rgb
from pipelines.report.patches import Box, ImagePatches
from pipelines.report.segments import Segment

BACKGROUND_SHADE_RGB = (14, 14, 18)


@dataclass(frozen=True)
class Overlay:
    """A PNG and the box of the original, in pixels, that it covers."""

    png: bytes
    place: Box


@dataclass(frozen=True)
class Layer:
    """One way to look at the photos.

    key: unique, made of letters, digits and dashes. about: a sentence for people who have never heard of it.
    scale: what the two ends of the colours of amounts mean. kinds: colours (RRGGBB) and what they stand for.
    overlays, notes: by image_id.
    """

    key: str
    title: str
    about: str
    overlays: dict[str, Overlay]
    scale: tuple[str, str] | None = None
    kinds: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)


def saliency_layer(patches: Mapping[str, ImagePatches]) -> Layer | None:
    overlays = {}
    for image_id, one in patches.items():
        if one.saliency is not None:
            overlays[image_id] = Overlay(_png(amounts_over(one.saliency)), one.place)
    about = (
        "How much the model looks at each patch when it sums up the photo in one description. It was never taught what "
        "matters; the bright patches matter most to it, and are usually the main thing in the photo."
    )
    return Layer("saliency", "Saliency", about, overlays, ("ignored", "looked at most")) if overlays else None


def descriptor_layer(patches: Mapping[str, ImagePatches], seed: int) -> Layer | None:
    ids = list(patches)
    coloured = descriptor_colours([patches[one].descriptor for one in ids], [patches[one].stored for one in ids], seed)
    overlays = {}
    for image_id, drawn in zip(ids, coloured, strict=True):
        shown = np.where(patches[image_id].stored, 255, 0).astype(np.uint8)
        overlays[image_id] = Overlay(_png(np.dstack([drawn, shown])), patches[image_id].thinned_place)
    about = (
        "Each patch has a long list of numbers, its descriptor. Here its main directions (PCA) are turned into a "
        "colour, with one rule for all photos: patches of the same colour look alike to the model, in any photo. Heads "
        "of different birds should match; the colours themselves mean nothing."
    )
    return Layer("descriptors", "Descriptors as colours", about, overlays) if overlays else None


def cluster_layer(number: int, clustering: Clustering, patches: Mapping[str, ImagePatches]) -> Layer:
    colours = cluster_colours(clustering)
    overlays = {}
    for image_id, grid in clustering.grids.items():
        if image_id not in patches:
            continue
        drawn = np.zeros((*grid.shape, 4), np.uint8)
        drawn[grid >= 0] = (*rgb(OTHER_KIND), 255)
        for cluster, colour in colours.items():
            drawn[grid == cluster] = (*rgb(colour), 255)
        overlays[image_id] = Overlay(_png(drawn), patches[image_id].place)
    total = clustering.shown.total()
    kinds = [(colour, f"cluster {one}: {clustering.shown[one] / total:.0%}") for one, colour in colours.items()]
    if rest := len(clustering.shown) - len(colours):
        share = 1 - sum(clustering.shown[one] for one in colours) / total
        kinds.append((OTHER_KIND, f"{counted(rest, 'other cluster')}: {share:.0%}"))
    about = (
        "Patches with similar descriptors, sorted into groups without names. One colour is one group, in all photos; "
        "the percentage says how many of the patches shown here are in it. The cards below show what each group is."
    )
    return Layer(f"clusters-{number}", f"Clusters: {clustering.name}", about, overlays, kinds=kinds)


def cluster_colours(clustering: Clustering) -> dict[int, str]:
    """The largest clusters of the images shown have colours of their own; the others share a grey."""
    return dict(zip(clustering.ranked, KINDS, strict=False))


def segment_layers(
    number: int, name: str, segments: Mapping[str, Segment], sizes: Mapping[str, tuple[int, int]]
) -> list[Layer]:
    """sizes: (width, height) of the originals in pixels, by image_id."""
    foreground, parts, most = {}, {}, 0
    for image_id, one in segments.items():
        whole = (0.0, 0.0, float(sizes[image_id][0]), float(sizes[image_id][1]))
        drawn = np.zeros((*one.foreground.shape, 4), np.uint8)
        drawn[~one.foreground] = (*BACKGROUND_SHADE_RGB, 255)
        foreground[image_id] = Overlay(_png(drawn), whole)
        drawn = np.zeros((*one.parts.shape, 4), np.uint8)
        for part in np.unique(one.parts[one.parts > 0]).tolist():
            drawn[one.parts == part] = (*rgb(part_colour(part - 1)), 255)
            most = max(most, part)
        parts[image_id] = Overlay(_png(drawn), whole)
    if not segments:
        return []
    notes = {image_id: one.note for image_id, one in segments.items() if one.note}
    first = Layer(
        f"foreground-{number}",
        f"Foreground: {name}",
        "What the photos of one set have in common, found by comparing them with each other. Everything else is "
        "darkened. Nothing was marked by hand.",
        foreground,
        notes=notes,
    )
    second = Layer(
        f"parts-{number}",
        f"Parts: {name}",
        "The common foreground, divided into parts. Within a set, one colour is the same part in every photo, such as "
        "head, body or wheels; the parts have no names, and another set's colours stand for other things.",
        parts,
        kinds=[(part_colour(part), f"part {part}") for part in range(most)],
        notes=notes,
    )
    return [first, second]


def part_colour(part: int) -> str:
    return PARTS[part % len(PARTS)]


def layers_in_order(layers: Sequence[Layer | None]) -> list[Layer]:
    return [one for one in layers if one is not None and one.overlays]


def _png(rgba: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
