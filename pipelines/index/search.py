"""search: the nearest images of a store, or where else in it a part of an image occurs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ops.nearest import NearestIndex, search_all
from pipelines import storage
from pipelines.errors import RequestError
from pipelines.index.picture import Shown, draw
from pipelines.index.query import Query, extracted_query, in_box, stored_query
from pipelines.results.indices import Manifest, index_names, read_dead, read_manifest, read_parts, without_dead
from pipelines.running.outputs import write_output
from pipelines.running.reports import JobResult, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.originals import stored_images
from pipelines.store.store import Store

MAX_HITS_PER_PATCH = 2_000

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class IndexContent:
    """All that an index holds.

    images: IMAGES rows of those that can be found, in ascending first_id. cells: CELLS in ascending id, or None.
    """

    parts: list[NearestIndex]
    images: pa.Table
    cells: pa.Table | None

    @classmethod
    def read(cls, store: Store, name: str, manifest: Manifest) -> IndexContent:
        """Raises JobError when a file of it is gone."""
        dead = read_dead(store, name, manifest)
        parts = read_parts(store, name, manifest, dead)
        cells = [part.cells for part in parts if part.cells is not None]
        images = without_dead(pa.concat_tables([part.images for part in parts]), dead)
        return cls([part.nearest for part in parts], images, pa.concat_tables(cells) if cells else None)


@dataclass
class Result(JobResult):
    """What a search found, best first.

    results: image_id, label, uri, similarity (cosine); from an index of patches also row, col, y, x (patch centre in
    pixels of the original) and query_row, query_col, the patch of the region it is nearest to. seconds: query, load,
    search.
    """

    name: str
    of: str
    image: str
    box: Box | None
    results: list[dict[str, Any]] = field(default_factory=list)
    saved: str | None = None


def run(
    config: Config,
    *,
    store: str,
    name: str,
    image: str,
    box: str | None = None,
    top: int = 10,
    save: str | None = None,
) -> Result:
    """Search index/NAME of `store` with an image, given by path, URI or image_id of the store.

    Args:
        box: X0,Y0,X1,Y1 in pixels of the image: search with the patches in it, in an index of patches.
        top: how many to return.
        save: where to write a PNG of the query and what was found.

    Raises:
        RequestError: no such index, one that does not fit the request or is older than the store, a box that is not in
            the image, an image that cannot be read.
    """
    started = time.monotonic()
    opened = Store.open(store, config)
    region = None if box is None else parse_box(box)
    manifest = _usable_index(opened, name, region)
    result = Result(new_run_id(), opened.uri, name, manifest.of, image, region)
    with recorded(None, result, started):
        began = time.monotonic()
        content = IndexContent.read(opened, name, manifest)
        result.seconds["load"] = time.monotonic() - began

        began = time.monotonic()
        in_store = pc.any(pc.equal(content.images["image_id"], image)).as_py()
        query = stored_query(opened, manifest, image) if in_store else extracted_query(opened, manifest, image, config)
        if region is not None:
            query = in_box(query, region)
        result.seconds["query"] = time.monotonic() - began

        began = time.monotonic()
        found = nearest_places(content, query, top) if region else nearest_images(content, query, top)
        result.results = _with_facts(opened, found)
        result.seconds["search"] = time.monotonic() - began
        if save is not None:
            result.saved = _save_picture(save, result, query, config)
    return result


def parse_box(text: str) -> Box:
    """Four numbers X0,Y0,X1,Y1. Raises RequestError for anything else."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--box is {text!r}, but it must be four numbers X0,Y0,X1,Y1 (pixels of IMAGE).") from None
    return x0, y0, x1, y1


def nearest_images(content: IndexContent, query: Query, top: int) -> list[dict[str, Any]]:
    """The images nearest to a query of one vector; the query itself, when it is of the store, is left out."""
    similarity, ids = search_all(content.parts, query.vectors, top + 1)
    found = [
        {"image_id": image_id, "similarity": round(float(value), 6)}
        for image_id, value in zip(_image_ids(content, ids[0]), similarity[0], strict=True)
        if image_id is not None and image_id != query.image_id
    ]
    return found[:top]


def nearest_places(content: IndexContent, query: Query, top: int) -> list[dict[str, Any]]:
    """The patches nearest to any patch of a region, each once; the region itself is left out."""
    assert content.cells is not None and query.cells is not None
    per_patch = min(MAX_HITS_PER_PATCH, top + (len(query.vectors) if query.image_id else 0))
    similarity, ids = search_all(content.parts, query.vectors, per_patch)
    by_similarity = np.argsort(-similarity, axis=None, kind="stable")
    # The best hit of every place.
    _, firsts = np.unique(ids.reshape(-1)[by_similarity], return_index=True)
    best = by_similarity[np.sort(firsts)]
    best = best[ids.reshape(-1)[best] >= 0]
    hit_ids = ids.reshape(-1)[best]
    cells = content.cells.take(pa.array(np.searchsorted(content.cells["id"].to_numpy(), hit_ids)))
    own = set(zip(query.cells["row"].to_pylist(), query.cells["col"].to_pylist(), strict=True))
    asked_by = query.cells.take(pa.array(best // per_patch)).to_pylist()
    found = []
    values = similarity.reshape(-1)[best]
    hits = zip(_image_ids(content, hit_ids), cells.to_pylist(), asked_by, values, strict=True)
    for image_id, cell, asked, value in hits:
        if image_id == query.image_id and (cell["row"], cell["col"]) in own:
            continue
        place = {key: cell[key] for key in ("row", "col", "y", "x")}
        nearest_to = {"query_row": asked["row"], "query_col": asked["col"]}
        found.append({"image_id": image_id, "similarity": round(float(value), 6), **place, **nearest_to})
        if len(found) == top:
            break
    return found


def _usable_index(store: Store, name: str, region: Box | None) -> Manifest:
    """The index's manifest. Raises RequestError when it cannot answer this."""
    manifest = read_manifest(store, name)
    if manifest is None:
        store.requires("a search", images=True)
        names = index_names(store)
        there = f"there are {', '.join(names)}" if names else "there is none yet"
        raise RequestError(
            f"The store {store.uri} has no index {name} ({there}): `dinoray index {store.uri} {name}` makes one."
        )
    version = store.images.content_version
    if manifest.images_version != version:
        settings = {key: value for key, value in manifest.holds.items() if value and value != "embeddings"}
        again = "".join(f" --set index.{key}={value}" for key, value in settings.items())
        raise RequestError(
            f"The index {name} is older than the store (it covers version {manifest.images_version} of the images "
            f"table, which is at {version}): update it with `dinoray index {store.uri} {name}{again}`."
        )
    if region is not None and manifest.of != "patches":
        raise RequestError(
            f"--box needs an index of patches, and {name} is of {manifest.of}: make one with "
            f"`dinoray index {store.uri} NAME --set index.of=patches`."
        )
    if region is None and manifest.of == "patches":
        raise RequestError(
            f"The index {name} is of patches: give --box X0,Y0,X1,Y1 (pixels of IMAGE), or search an index of images."
        )
    return manifest


def _image_ids(content: IndexContent, ids: np.ndarray) -> list[str | None]:
    """The images that ids belong to; None for -1."""
    with_vectors = content.images.filter(pc.greater(content.images["vectors"], 0))
    at = np.searchsorted(with_vectors["first_id"].to_numpy(), ids, side="right") - 1
    return with_vectors["image_id"].take(pa.array(at, mask=ids < 0)).to_pylist()


def _with_facts(store: Store, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Found rows with label and uri of their images."""
    rows = store.images.rows_with_ids({row["image_id"] for row in found}, ["image_id", "label", "uri"])
    facts = {row["image_id"]: {"label": row["label"], "uri": row["uri"]} for row in rows.to_pylist()}
    return [{"image_id": row["image_id"], **facts.get(row["image_id"], {}), **row} for row in found]


def _save_picture(target: str, result: Result, query: Query, config: Config) -> str:
    """Write the picture of a result. Raises JobError when it cannot be written."""
    options = config.storage.options
    places: dict[str, list[dict[str, Any]]] = {}
    for row in result.results:
        places.setdefault(row["image_id"], []).append(row)
    data = stored_images([query.uri, *(rows[0].get("uri", "") for rows in places.values())], options)
    shown = [Shown("query", data.get(query.uri), box_xyxy=result.box)]
    for image_id, rows in places.items():
        points = [(row["x"], row["y"]) for row in rows if "x" in row]
        caption = f"{image_id[-36:]}\n{rows[0]['similarity']:.3f}"
        shown.append(Shown(caption, data.get(rows[0].get("uri", "")), points))
    uri = storage.normalise(target)
    write_output(uri, draw(shown), options)
    return uri
