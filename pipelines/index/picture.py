"""What a search found, as one picture: the query with its box, then the images it found, places marked."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from dino_ops.errors import ImageError
from dino_ops.images import DEFAULT_MAX_PIXELS, decode_image

TILE_PIXELS, CAPTION_PIXELS, GAP_PIXELS = 224, 30, 8
COLUMNS = 5
BACKGROUND, INK, MISSING, MARK = "white", "black", "lightgrey", "red"
MARK_RADIUS_PIXELS = 5


@dataclass(frozen=True)
class Shown:
    """One image of the picture.

    data: bytes of its file, None when they cannot be had. points_xy: places to mark; box_xyxy: a box to draw; both in
    pixels of the original.
    """

    caption: str
    data: bytes | None
    points_xy: list[tuple[float, float]] = field(default_factory=list)
    box_xyxy: tuple[float, float, float, float] | None = None


def draw(shown: Sequence[Shown], max_pixels: int = DEFAULT_MAX_PIXELS) -> bytes:
    """A PNG with a tile for each image, COLUMNS in a row."""
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // COLUMNS)
    step_x, step_y = TILE_PIXELS + GAP_PIXELS, TILE_PIXELS + CAPTION_PIXELS + GAP_PIXELS
    picture = Image.new("RGB", (GAP_PIXELS + columns * step_x, GAP_PIXELS + rows * step_y), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for place, one in enumerate(shown):
        row, column = divmod(place, COLUMNS)
        left, top = GAP_PIXELS + column * step_x, GAP_PIXELS + row * step_y
        picture.paste(_tile(one, max_pixels), (left, top))
        pen.multiline_text((left, top + TILE_PIXELS + 2), one.caption, fill=INK)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _tile(shown: Shown, max_pixels: int) -> Image.Image:
    tile = Image.new("RGB", (TILE_PIXELS, TILE_PIXELS), MISSING)
    pen = ImageDraw.Draw(tile)
    try:
        image = decode_image(shown.data, max_pixels) if shown.data else None
    except ImageError:
        image = None
    if image is None:
        pen.text((GAP_PIXELS, GAP_PIXELS), "cannot be read", fill=INK)
        return tile
    scale = TILE_PIXELS / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    tile.paste(small, (0, 0))
    if shown.box_xyxy is not None:
        x0, y0, x1, y1 = (value * scale for value in shown.box_xyxy)
        pen.rectangle((x0, y0, x1, y1), outline=MARK, width=2)
    for x, y in shown.points_xy:
        at_x, at_y = x * scale, y * scale
        corners = (
            at_x - MARK_RADIUS_PIXELS,
            at_y - MARK_RADIUS_PIXELS,
            at_x + MARK_RADIUS_PIXELS,
            at_y + MARK_RADIUS_PIXELS,
        )
        pen.ellipse(corners, outline=MARK, width=2)
    return tile
