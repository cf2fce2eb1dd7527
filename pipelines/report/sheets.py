"""The report's plots as PNG files for papers and slides: the same contents, colours and places as in the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_ops.compact_descriptors import cosines, region_query
from pipelines.report.clusterings import Clustering
from pipelines.report.colours import LINES, OTHER_KIND, amounts, amounts_over, rgb
from pipelines.report.contents import Contents, Shown
from pipelines.report.layers import Layer, Overlay, cluster_colours
from pipelines.report.matched_pairs import MatchedPair

# Pixels.
SHEET_WIDTH, PHOTO_HEIGHT, GAP = 1600, 200, 8
LAYER_OPACITY = 0.75
SIMILARITY_OPACITY = 0.62
PAPER, INK, MISSING = (255, 255, 255), (29, 27, 38), (139, 139, 146)
FONT_SIZE = 15


@dataclass
class _Placed:
    picture: Image.Image
    left: int
    top: int


def make_sheets(contents: Contents) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG) of every plot."""
    photos = [_photo(one) for one in contents.images]
    yield "photos.png", _png(_sheet(photos))
    for layer in contents.layers:
        covered = [
            _covered(photo, layer.overlays.get(one.image_id), one, LAYER_OPACITY)
            for photo, one in zip(photos, contents.images, strict=True)
        ]
        yield f"{_slug(layer.title)}.png", _png(_with_legend(_sheet(covered), layer))
    if contents.live:
        yield "similarity.png", _png(_similarity(contents, photos))
    shown = {one.image_id: photo for one, photo in zip(contents.images, photos, strict=True)}
    sizes = {one.image_id: one for one in contents.images}
    for name, pairs in contents.pairs.items():
        for number, pair in enumerate(pairs, 1):
            yield f"matches-{_slug(name)}-{number:02}.png", _png(_pair(pair, sizes))
    everything = shown | {image_id: _photo(one) for image_id, one in contents.others.items()}
    for number, neighbours in enumerate(contents.neighbours, 1):
        rows = [
            [everything[query], *(everything[other] for other, _ in found if other in everything)]
            for query, found in neighbours.found.items()
        ]
        yield f"nearest-{number}.png", _png(_stacked([_row(row, PHOTO_HEIGHT // 2 + 40) for row in rows]))
    for clustering in contents.clusterings:
        if cards := _cards(contents, clustering, shown):
            yield f"clusters-{_slug(clustering.name)}-members.png", _png(_stacked(cards))


def _photo(one: Shown, height: int = PHOTO_HEIGHT) -> Image.Image:
    size = max(1, round(one.width * height / one.height)), height
    picture = one.photo.picture
    return Image.new("RGB", size, MISSING) if picture is None else picture.resize(size, Image.Resampling.LANCZOS)


def _covered(photo: Image.Image, overlay: Overlay | None, one: Shown, opacity: float) -> Image.Image:
    if overlay is None:
        return photo
    left, top, width, height = overlay.place
    scale_x, scale_y = photo.width / one.width, photo.height / one.height
    drawn = Image.open(io.BytesIO(overlay.png)).convert("RGBA")
    size = max(1, round(width * scale_x)), max(1, round(height * scale_y))
    drawn = drawn.resize(size, Image.Resampling.NEAREST)
    drawn.putalpha(drawn.getchannel("A").point(lambda value: round(value * opacity)))
    result = photo.convert("RGBA")
    whole = Image.new("RGBA", photo.size)
    whole.paste(drawn, (round(left * scale_x), round(top * scale_y)))
    return Image.alpha_composite(result, whole).convert("RGB")


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height in rows, each as full as it can be."""
    placed: list[_Placed] = []
    left, top = GAP, GAP
    for picture in pictures:
        if left > GAP and left + picture.width + GAP > SHEET_WIDTH:
            left, top = GAP, top + PHOTO_HEIGHT + GAP
        placed.append(_Placed(picture, left, top))
        left += picture.width + GAP
    width = max((one.left + one.picture.width + GAP for one in placed), default=SHEET_WIDTH)
    sheet = Image.new("RGB", (width, top + PHOTO_HEIGHT + GAP), PAPER)
    for one in placed:
        sheet.paste(one.picture, (one.left, one.top))
    return sheet


def _row(pictures: Sequence[Image.Image], height: int) -> Image.Image:
    """The first one apart from the others."""
    small = [one.resize((max(1, round(one.width * height / one.height)), height)) for one in pictures]
    width = sum(one.width + GAP for one in small) + 3 * GAP
    row = Image.new("RGB", (width, height), PAPER)
    left = 0
    for number, one in enumerate(small):
        row.paste(one, (left, 0))
        left += one.width + (4 * GAP if number == 0 else GAP)
    return row


def _stacked(rows: Sequence[Image.Image]) -> Image.Image:
    width = max(row.width for row in rows) + 2 * GAP
    sheet = Image.new("RGB", (width, GAP + sum(row.height + GAP for row in rows)), PAPER)
    top = GAP
    for row in rows:
        sheet.paste(row, (GAP, top))
        top += row.height + GAP
    return sheet


def _with_legend(sheet: Image.Image, layer: Layer) -> Image.Image:
    if layer.scale:
        return _stacked([sheet, _scale(layer.scale[0], layer.scale[1], "0", "1")])
    if not layer.kinds:
        return sheet
    legend = Image.new("RGB", (sheet.width, 30 * (1 + len(layer.kinds) // 6)), PAPER)
    pen, step = ImageDraw.Draw(legend), max(sheet.width // 6, 180)
    per_row = max(sheet.width // step, 1)
    for number, (colour, what) in enumerate(layer.kinds):
        row, column = divmod(number, per_row)
        x, y = GAP + column * step, 30 * row + 7
        pen.rectangle((x, y, x + 15, y + 15), fill=rgb(colour))
        pen.text((x + 22, y - 1), what, fill=INK, font=_font())
    return _stacked([sheet, legend])


def _scale(low: str, high: str, low_value: str, high_value: str) -> Image.Image:
    strip = Image.new("RGB", (700, 30), PAPER)
    pen = ImageDraw.Draw(strip)
    pen.text((220, 5), f"{low} ({low_value})", fill=INK, font=_font(), anchor="ra")
    ramp = np.broadcast_to(amounts(np.linspace(0, 1, 220))[None], (16, 220, 3))
    strip.paste(Image.fromarray(np.ascontiguousarray(ramp)), (230, 7))
    pen.text((460, 5), f"{high} ({high_value})", fill=INK, font=_font())
    return strip


def _similarity(contents: Contents, photos: Sequence[Image.Image]) -> Image.Image:
    """What the page's live view begins with: a patch, framed, and where the others resemble it."""
    live = contents.live
    assert live is not None  # called only where there is one
    asked, row, column = live.start
    own = row * live.grids[asked][1] + column
    query = region_query(live.of(asked)[[own]])
    numbers = {image_id: number for number, image_id in enumerate(live.image_ids)}
    drawn = []
    for one, photo in zip(contents.images, photos, strict=True):
        number = numbers.get(one.image_id)
        if number is None:
            continue
        grid, place = live.grids[number], contents.places[one.image_id]
        picture = photo.copy()
        at = own
        if number != asked:
            codes = live.of(number)
            similar = cosines(codes, query)
            there = codes.any(axis=1)
            if not there.any():
                continue
            level = (similar - live.low) / (live.high - live.low)
            heat = amounts_over(np.where(there, level, np.nan).reshape(grid))
            picture = _covered(photo, Overlay(_png(Image.fromarray(heat)), place), one, SIMILARITY_OPACITY)
            at = int(np.where(there, similar, -np.inf).argmax())
        _mark(picture, one, place, grid, at, own=number == asked)
        drawn.append((number != asked, picture))
    ordered = [picture for _, picture in sorted(drawn, key=lambda item: item[0])]
    legend = _scale("unrelated", "alike", f"{live.low:.2f}", f"{live.high:.2f}")
    return _stacked([_sheet(ordered), legend])


def _mark(
    picture: Image.Image,
    one: Shown,
    place: tuple[float, float, float, float],
    grid: tuple[int, int],
    at: int,
    *,
    own: bool,
) -> None:
    """A frame around the patch asked for, a ring around a best match."""
    left, top, width, height = place
    scale_x, scale_y = picture.width / one.width, picture.height / one.height
    row, column = divmod(at, grid[1])
    cell_x, cell_y = width / grid[1] * scale_x, height / grid[0] * scale_y
    x, y = (left * scale_x) + (column + 0.5) * cell_x, (top * scale_y) + (row + 0.5) * cell_y
    half_x, half_y = (max(cell_x / 2, 4), max(cell_y / 2, 4)) if own else (8, 8)
    pen = ImageDraw.Draw(picture)
    draw = pen.rectangle if own else pen.ellipse
    draw((x - half_x - 1, y - half_y - 1, x + half_x + 1, y + half_y + 1), outline=(0, 0, 0), width=4)
    draw((x - half_x, y - half_y, x + half_x, y + half_y), outline=(255, 255, 255), width=2)


def _pair(pair: MatchedPair, sizes: dict[str, Shown]) -> Image.Image:
    """Drawn at twice the sheet's height."""
    a, b = (_photo(sizes[one], 2 * PHOTO_HEIGHT) for one in (pair.image_a, pair.image_b))
    offset = a.width + 2 * GAP
    drawing = Image.new("RGB", (offset + b.width, 2 * PHOTO_HEIGHT), PAPER)
    drawing.paste(a, (0, 0))
    drawing.paste(b, (offset, 0))
    pen = ImageDraw.Draw(drawing)
    scale_a = 2 * PHOTO_HEIGHT / sizes[pair.image_a].height
    scale_b = 2 * PHOTO_HEIGHT / sizes[pair.image_b].height
    ends = [
        ((one.x_a * scale_a, one.y_a * scale_a), (offset + one.x_b * scale_b, one.y_b * scale_b))
        for one in pair.matches
    ]
    for number, (start, end) in enumerate(ends):
        pen.line((start, end), fill=INK, width=6)
        pen.line((start, end), fill=rgb(LINES[number % len(LINES)]), width=3)
    for number, line in enumerate(ends):
        for x, y in line:
            fill = rgb(LINES[number % len(LINES)])
            pen.ellipse((x - 11, y - 11, x + 11, y + 11), fill=fill, outline=INK, width=2)
            pen.text((x, y), str(number + 1), fill=INK, font=_font(), anchor="mm")
    return drawing


def _cards(contents: Contents, clustering: Clustering, shown: dict[str, Image.Image]) -> list[Image.Image]:
    """A row for each cluster: its colour, its name, its typical members."""
    colours = cluster_colours(clustering)
    rows = []
    for cluster in clustering.ranked[: contents.most_clusters]:
        pieces = []
        for one in clustering.typical.get(cluster, ()):
            if one.row is None or one.col is None:
                pieces.append(shown[one.image_id])
            elif crop := contents.crops.get((one.image_id, one.row, one.col)):
                picture = Image.open(io.BytesIO(crop.jpeg)).convert("RGB")
                x, y, width, height = crop.mark
                ImageDraw.Draw(picture).rectangle((x, y, x + width, y + height), outline=(255, 255, 255), width=2)
                pieces.append(picture)
        if not pieces:
            continue
        small = [piece.resize((max(1, round(piece.width * 96 / piece.height)), 96)) for piece in pieces]
        row = Image.new("RGB", (190 + sum(piece.width + GAP for piece in small), 96), PAPER)
        pen = ImageDraw.Draw(row)
        pen.rectangle((0, 38, 20, 58), fill=rgb(colours.get(cluster, OTHER_KIND)))
        pen.text((32, 48), f"cluster {cluster}", fill=INK, font=_font(), anchor="lm")
        left = 190
        for piece in small:
            row.paste(piece, (left, 0))
            left += piece.width + GAP
        rows.append(row)
    return rows


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", name.lower()).strip("-.")
