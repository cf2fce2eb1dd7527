"""The photos of a report: read where they were, made small, and kept out of memory as soon as they are.

A photo that is gone, cannot be read or is not what it was becomes a reason, never an error.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image

from dino_ops.errors import ImageError
from dino_ops.images import decode_image
from pipelines import storage
from pipelines.sources import LISTING_SCHEMA, fetch
from pipelines.store.originals import locate

PHOTO_FILES_IN_MEMORY = 16
FETCH_ATTEMPTS = 2
JPEG_QUALITY = 82

# Called with the image_id and the photo at its full size.
Look = Callable[[str, Image.Image], None]


@dataclass(frozen=True)
class PhotoSource:
    """An image of the store: where its bytes are, and the size in pixels that it had when it was extracted."""

    image_id: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Photo:
    """A photo as the page has it.

    width, height: pixels of `jpeg`. jpeg: None where there is no photo; `reason` then says why.
    """

    image_id: str
    width: int
    height: int
    jpeg: bytes | None
    reason: str = ""

    @property
    def picture(self) -> Image.Image | None:
        return Image.open(io.BytesIO(self.jpeg)).convert("RGB") if self.jpeg else None


def read_photos(
    sources: Sequence[PhotoSource], side: int, max_pixels: int, options: storage.Options, look: Look | None = None
) -> list[Photo]:
    """The photos, in order, their longer side `side` pixels at most."""
    rows = {row["uri"]: row for row in locate([one.uri for one in sources], options).to_pylist()}
    return [
        _small(source, data, reason, side, max_pixels, look)
        for source, data, reason in _fetched(sources, rows, options)
    ]


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """The size of a picture whose longer side is `side` at most."""
    scale = min(1.0, side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _fetched(
    sources: Sequence[PhotoSource], rows: dict[str, dict[str, object]], options: storage.Options
) -> Iterator[tuple[PhotoSource, bytes | None, str]]:
    for first in range(0, len(sources), PHOTO_FILES_IN_MEMORY):
        chunk = sources[first : first + PHOTO_FILES_IN_MEMORY]
        there = [rows[one.uri] for one in chunk if one.uri in rows]
        got = iter(fetch(pa.Table.from_pylist(there, LISTING_SCHEMA), storage_options=options, attempts=FETCH_ATTEMPTS))
        for source in chunk:
            if source.uri not in rows:
                yield source, None, "no longer where it was"
                continue
            one = next(got)
            missing = isinstance(one.error, FileNotFoundError)
            yield source, one.data, "no longer where it was" if missing else f"cannot be read: {_said(one.error)}"


def _small(
    source: PhotoSource, data: bytes | None, reason: str, side: int, max_pixels: int, look: Look | None
) -> Photo:
    width, height = fitted(source.width, source.height, side)
    if data is None:
        return Photo(source.image_id, width, height, None, reason)
    try:
        picture = decode_image(data, max_pixels)
    except ImageError as error:
        return Photo(source.image_id, width, height, None, f"cannot be used: {_said(error)}")
    if picture.size != (source.width, source.height):
        return Photo(source.image_id, width, height, None, "has changed since its features were extracted")
    if look is not None:
        look(source.image_id, picture)
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    return Photo(source.image_id, width, height, jpeg(small))


def _said(error: Exception | None) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
