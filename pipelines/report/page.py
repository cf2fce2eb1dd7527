"""The HTML file: contents put into the template, with nothing in it that reaches for a network.

The template escapes by itself (Jinja's autoescape: even a name that was not thought of stays text),
data for the live view lie in a block that is not run, and a Content-Security-Policy allows the page's own script and
style by their hashes and pictures that the page carries, nothing else.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.report.clusterings import Clustering
from pipelines.report.colours import FAINT, LINES, OTHER_KIND, amount_table
from pipelines.report.contents import Contents, Shown
from pipelines.report.glance import looked_at_all
from pipelines.report.layers import cluster_colours
from pipelines.report.live import Live
from pipelines.report.matched_pairs import MatchedPair

PAIR_GAP_PER_HEIGHT = 0.04


@dataclass(frozen=True)
class Page:
    """html: UTF-8. sections: titles of those there are."""

    html: bytes
    sections: list[str]


def make_page(contents: Contents) -> Page:
    style, script = _file("report.css"), _file("report.js") + _file("live.js")
    places = {one.image_id: at for at, one in enumerate([*contents.images, *contents.others.values()])}
    photos = [_photo(one) for one in (*contents.images, *contents.others.values())]
    clusters = [_clustering(contents, one, places) for one in contents.clusterings]
    pairs = [(name, [_pair(contents, one, places) for one in found]) for name, found in contents.pairs.items()]
    sections = [("glance", "At a glance")]
    sections += [("live", "Point and see")] if contents.live else []
    sections += [("layers", "Photos and layers")]
    sections += [("matches", "Matches")] if pairs else []
    sections += [("nearest", "Nearest photos")] if contents.neighbours else []
    sections += [("clusters", "Clusters")] if clusters else []
    html = _template().render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        sections=sections,
        made=f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC",
        version=metadata.version("dinoray"),
        contents=contents,
        glance=contents.glance,
        looked_at_all=looked_at_all(contents.glance),
        photos=photos,
        place=places,
        shown=[photos[places[one.image_id]] for one in contents.images],
        amounts=amount_table()[::17],
        live_tiles=[photos[places[one]] for one in contents.live.image_ids] if contents.live else [],
        live=contents.live,
        live_data=_json(_live_data(contents, contents.live, photos, places)) if contents.live else "",
        layers=contents.layers,
        pairs=pairs,
        clusters=clusters,
        lines=LINES,
    )
    return Page(html.encode(), [title for _, title in sections])


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["uri"] = _data_uri
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment.get_template("report.html")


def _file(name: str) -> str:
    return resources.files("pipelines.report").joinpath("page", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {hashed(style)}; script-src {hashed(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(data: Any) -> Markup:
    """JSON that stands in an element of HTML: what could end it, or begin a comment, is written in another way."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _data_uri(data: bytes, kind: str) -> Markup:
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def _photo(one: Shown) -> dict[str, Any]:
    folder, slash, name = one.image_id.rpartition("/")
    return {
        "id": one.image_id,
        "folder": folder + slash,
        "name": name or one.image_id,
        "label": one.label,
        "width": one.width,
        "height": one.height,
        "jpeg": one.photo.jpeg,
        "reason": one.photo.reason,
    }


def _live_data(contents: Contents, live: Live, photos: list[dict[str, Any]], places: dict[str, int]) -> dict[str, Any]:
    images = []
    for image_id, grid in zip(live.image_ids, live.grids, strict=True):
        photo, (left, top, width, height) = photos[places[image_id]], contents.places[image_id]
        images.append(
            {
                "id": image_id,
                "photo": places[image_id],
                "size": [photo["width"], photo["height"]],
                "grid": grid,
                "place": [round(float(value), 3) for value in (left, top, width, height)],
            }
        )
    return {
        "images": images,
        "dimensions": live.codes.shape[1],
        "codes": base64.b64encode(live.codes.tobytes()).decode(),
        "low": live.low,
        "high": live.high,
        "colours": amount_table(),
        "faint": FAINT,
        "start": live.start,
    }


def _pair(contents: Contents, pair: MatchedPair, places: dict[str, int]) -> dict[str, Any]:
    """Both photos side by side, as high as each other, with the matches' ends in the drawing's pixels."""
    a, b = (contents.images[places[one]] for one in (pair.image_a, pair.image_b))
    height = 240.0
    scale_a, scale_b = height / a.height, height / b.height
    offset = a.width * scale_a + PAIR_GAP_PER_HEIGHT * height
    lines = [
        {
            "number": number,
            "colour": LINES[(number - 1) % len(LINES)],
            "similarity": match.similarity,
            "a": (match.x_a * scale_a, match.y_a * scale_a),
            "b": (offset + match.x_b * scale_b, match.y_b * scale_b),
        }
        for number, match in enumerate(pair.matches, 1)
    ]
    return {
        "a": places[pair.image_a],
        "b": places[pair.image_b],
        "names": (pair.image_a, pair.image_b),
        "score": pair.score,
        "scale_a": scale_a,
        "scale_b": scale_b,
        "offset": offset,
        "width": offset + b.width * scale_b,
        "height": height,
        "lines": lines,
    }


def _clustering(contents: Contents, one: Clustering, places: dict[str, int]) -> dict[str, Any]:
    colours = cluster_colours(one)
    total, of_all = one.shown.total(), sum(one.sizes.values())
    cards = [
        {
            "id": cluster,
            "colour": colours.get(cluster, OTHER_KIND),
            "share": one.shown[cluster] / total,
            "size": one.sizes.get(cluster, 0),
            "of_all": one.sizes.get(cluster, 0) / of_all if of_all else 0.0,
            "images": one.images[cluster],
            "pieces": pieces,
        }
        for cluster in one.ranked[: contents.most_clusters]
        if (pieces := _pieces(contents, one, cluster, places))
    ]
    return {"name": one.name, "of": one.of, "cards": cards, "count": len(one.sizes), "seen": len(one.shown)}


def _pieces(contents: Contents, one: Clustering, cluster: int, places: dict[str, int]) -> list[dict[str, Any]]:
    """Crops of typical patches, or the photos of typical images."""
    found = []
    for typical in one.typical.get(cluster, ()):
        piece: dict[str, Any] = {"image_id": typical.image_id, "photo": places[typical.image_id], "crop": None}
        if typical.row is not None and typical.col is not None:
            piece["crop"] = contents.crops.get((typical.image_id, typical.row, typical.col))
            if piece["crop"] is None:  # the photo cannot be had
                continue
        found.append(piece)
    return found
