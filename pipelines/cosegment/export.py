"""Masks of a co-segmentation as PNG files, and drawn over their pictures, below any folder or URI.

    MASKS/foreground/NAME.png    255 = the common foreground
    MASKS/parts/NAME.png         part_id + 1, 0 = background
    OVERLAYS/NAME.png            the picture with its parts in colours and the foreground's outline

NAME is the image_id without its ending. Sets of a file have a folder each, since an image may be in several.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from dino_ops.errors import ImageError
from dino_ops.images import DEFAULT_MAX_PIXELS, decode_image
from pipelines import storage
from pipelines.results.masks import read_png
from pipelines.results.parts import PartTables
from pipelines.running.outputs import write_output
from pipelines.sources.names import extension, is_image_name
from pipelines.store.originals import stored_images
from pipelines.store.parquet import open_parquet

WRITES_AT_ONCE = 16
ROWS_AT_ONCE = 64
# File systems allow 255.
LONGEST_FILE_NAME_BYTES = 200
LONGEST_OVERLAY_SIDE_PIXELS = 1024
OPACITY = 0.5
OUTLINE = (255, 255, 255)
# People who do not see all colours can distinguish these (Okabe and Ito). Further parts begin again with the first.
PART_COLOURS = [
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
]  # fmt: skip

_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')


@dataclass(frozen=True)
class Export:
    """What is written where.

    tables: parts/NAME. masks, overlays: folders or URIs, None for none. by_set: in a folder for each set.
    """

    tables: str
    masks: str | None
    overlays: str | None
    by_set: bool
    options: dict[str, Any]


def file_names(image_ids: Sequence[str]) -> dict[str, str]:
    """A path for each image, without its ending; no image_id leads out of the folder that the paths are below.

    Images that differ only in their ending keep it.
    """
    stems = {image_id: _safe(_stem(image_id)) for image_id in image_ids}
    taken = Counter(stems.values())

    def name(image_id: str) -> str:
        if taken[stems[image_id]] == 1:
            return stems[image_id]
        whole = _safe(image_id)
        return whole if whole not in taken else _marked(whole, image_id)

    return {image_id: name(image_id) for image_id in image_ids}


def export_file(export: Export, file: str, names: dict[str, str], uris: dict[str, str]) -> int:
    """Write the masks and overlays of one file of parts/NAME/images. Returns the number of files written.

    names: those of the images of the file, as file_names made them. uris: where their pictures are, for overlays.

    Raises JobError where they cannot be written.
    """
    written = 0
    columns = ["image_id", "set_id", "mask_png", "foreground_png"]
    with open_parquet(storage.join(export.tables, "images", file), export.options) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
            written += _write_all(_contents(export, batch.to_pylist(), names, uris), export.options)
    return written


def _contents(
    export: Export, rows: list[dict[str, Any]], names: dict[str, str], uris: dict[str, str]
) -> Iterator[tuple[str, bytes]]:
    """(URI, bytes) of every file of some rows."""
    pictures = {}
    if export.overlays:
        pictures = stored_images([uris.get(row["image_id"], "") for row in rows], export.options)
    for row in rows:
        name = names[row["image_id"]]
        if export.by_set:
            name = f"{_set_folder(row['set_id'])}/{name}"
        if export.masks:
            yield storage.join(export.masks, "foreground", f"{name}.png"), row["foreground_png"]
            yield storage.join(export.masks, "parts", f"{name}.png"), row["mask_png"]
        if export.overlays:
            picture = pictures.get(uris.get(row["image_id"], ""))
            drawn = draw_overlay(picture, read_png(row["mask_png"]), read_png(row["foreground_png"]))
            yield storage.join(export.overlays, f"{name}.png"), drawn


def draw_overlay(picture: bytes | None, parts: np.ndarray, foreground: np.ndarray) -> bytes:
    """A PNG of a picture, its parts in colours and its foreground outlined, reduced to LONGEST_OVERLAY_SIDE_PIXELS.

    picture: the bytes of its file; None, or one that cannot be decoded, is drawn as grey. parts: (H, W) part_id + 1.
    foreground: (H, W), 0 outside.
    """
    height, width = parts.shape
    scale = min(1.0, LONGEST_OVERLAY_SIDE_PIXELS / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    rgb = np.full((size[1], size[0], 3), 127, np.float32)
    if picture:
        try:
            decoded = decode_image(picture, DEFAULT_MAX_PIXELS)
        except ImageError:
            decoded = None
        if decoded is not None and decoded.size == (width, height):
            rgb = np.asarray(decoded.resize(size, Image.Resampling.BILINEAR), np.float32)
    small_parts, inside = (
        np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in (parts, foreground)
    )
    palette = np.array(PART_COLOURS, np.float32)
    coloured = palette[(small_parts.astype(np.int64) - 1) % len(palette)]
    drawn = np.where((small_parts > 0)[..., None], (1 - OPACITY) * rgb + OPACITY * coloured, rgb)
    drawn[_outline(inside > 0)] = OUTLINE
    buffer = io.BytesIO()
    Image.fromarray(drawn.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that have a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _write_all(contents: Iterable[tuple[str, bytes]], options: dict[str, Any]) -> int:
    def write(item: tuple[str, bytes]) -> None:
        write_output(*item, options)

    with ThreadPoolExecutor(WRITES_AT_ONCE) as pool:
        return sum(1 for _ in pool.map(write, contents))


def _stem(image_id: str) -> str:
    """An image_id without the ending of an image."""
    return image_id[: -len(extension(image_id))] if is_image_name(posixpath.basename(image_id)) else image_id


def _safe(name: str) -> str:
    """A relative path that stays below its folder; one that had to be changed is marked with a hash of what it was."""
    parts = [_UNSAFE.sub("_", part).strip(" ") for part in name.split("/")]
    parts = [
        part.encode()[:LONGEST_FILE_NAME_BYTES].decode(errors="ignore") for part in parts if part not in ("", ".", "..")
    ]
    safe = "/".join(parts) or "image"
    return safe if safe == name else _marked(safe, name)


def _set_folder(set_id: str) -> str:
    """One folder for a set, whatever its id."""
    flat = set_id.replace("/", "_")
    return _safe(flat) if flat == set_id else _marked(_safe(flat), set_id)


def _marked(safe: str, name: str) -> str:
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def exported_images(tables: PartTables, images: pa.Table) -> tuple[dict[str, str], dict[str, str]]:
    """(file names, uris) of every image of NAME. images: image_id, uri."""
    there = pc.unique(tables.images.read(["image_id"])["image_id"])
    rows = images.select(["image_id", "uri"]).filter(pc.is_in(images["image_id"], value_set=there))
    uris = dict(zip(rows["image_id"].to_pylist(), rows["uri"].to_pylist(), strict=True))
    return file_names(there.to_pylist()), uris
