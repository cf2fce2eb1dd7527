"""The photos nearest to some of a report: in the whole store where there is an index, else among those shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ops.nearest import search_all, unit
from pipelines.errors import DinorayError
from pipelines.results.index_vectors import vector_batches
from pipelines.results.indices import index_names, read_dead, read_manifest, read_parts, without_dead
from pipelines.settings.sections import IndexSettings, ReportSettings
from pipelines.store.store import Store

NEAREST_PER_PHOTO = 6
MAX_INDEX_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Neighbours:
    """The nearest images to some, nearest first, with their cosine. where: what was searched, in words."""

    where: str
    found: dict[str, list[tuple[str, float]]]


def nearest_photos(store: Store, images: pa.Table, settings: ReportSettings) -> list[Neighbours]:
    """Neighbours in every index of images that is up to date and small enough; without any, among the images shown.

    images: COLUMNS of pipelines.report.choose.
    """
    asked = _spread(images, settings.nearest)
    if not len(asked) or len(images) < 2:
        return []
    found = [one for name in index_names(store) if (one := _in_index(store, name, asked))]
    if found:
        return found
    there = images.filter(pc.is_valid(images["embedding"]))
    if len(there) < 2:
        return []
    vectors = unit(np.array(there["embedding"].to_pylist(), np.float32))
    ids = there["image_id"].to_pylist()
    places = {image_id: at for at, image_id in enumerate(ids)}
    result = {}
    for image_id in asked["image_id"].to_pylist():
        if image_id in places:
            similarity = vectors @ vectors[places[image_id]]
            order = [at for at in np.argsort(-similarity, kind="stable") if at != places[image_id]][:NEAREST_PER_PHOTO]
            result[image_id] = [(ids[at], float(similarity[at])) for at in order]
    return [Neighbours("among the photos shown here", result)] if result else []


def _spread(images: pa.Table, count: int) -> pa.Table:
    """Some images, of as many different labels as possible."""
    of_label: dict[str | None, list[int]] = defaultdict(list)
    for at, label in enumerate(images["label"].to_pylist()):
        of_label[label].append(at)
    turns = sorted((turn, places[0], at) for places in of_label.values() for turn, at in enumerate(places))
    return images.take(pa.array(sorted(at for _, _, at in turns[:count]), pa.int64()))


def _in_index(store: Store, name: str, asked: pa.Table) -> Neighbours | None:
    try:
        manifest = read_manifest(store, name)
        usable = manifest and manifest.of != "patches" and manifest.images_version == store.images.version
        if manifest is None or not usable or manifest.memory_bytes > MAX_INDEX_MEMORY_BYTES:
            return None
        dead = read_dead(store, name, manifest)
        parts = read_parts(store, name, manifest, dead)
    except DinorayError:  # `dinoray verify` says what is wrong with the index
        return None
    rows = without_dead(pa.concat_tables([part.images for part in parts]), dead)
    rows = rows.filter(pc.greater(rows["vectors"], 0))
    holds = IndexSettings.model_validate({key: value for key, value in manifest.holds.items() if value})
    found: dict[str, list[tuple[str, float]]] = {}
    located = store.images.rows_with_ids(asked["image_id"].to_pylist(), ["image_id", "run_id", "shard"])
    for batch in vector_batches(store, holds, located):
        similarity, ids = search_all([part.nearest for part in parts], batch.vectors, NEAREST_PER_PHOTO + 1)
        for image_id, values, hits in zip(batch.image_ids.to_pylist(), similarity, ids, strict=True):
            own = [pair for pair in zip(_names(rows, hits), map(float, values), strict=True) if pair[0] != image_id]
            found[image_id] = [(other, value) for other, value in own if other is not None][:NEAREST_PER_PHOTO]
    order = [one for one in asked["image_id"].to_pylist() if one in found]
    return Neighbours(
        f"in all {manifest.images:,} images of the store (index {name})", {one: found[one] for one in order}
    )


def _names(rows: pa.Table, ids: np.ndarray) -> Sequence[str | None]:
    """The images that ids of an index belong to; None for -1. rows: IMAGES of the index, by first_id."""
    at = np.searchsorted(rows["first_id"].to_numpy(), ids, side="right") - 1
    return rows["image_id"].take(pa.array(at, mask=ids < 0)).to_pylist()


def shown_besides(neighbours: Sequence[Neighbours], shown: Sequence[str]) -> Iterator[str]:
    """Images that were found and are not among those shown, each once."""
    seen = set(shown)
    for one in neighbours:
        for pairs in one.found.values():
            for image_id, _ in pairs:
                if image_id not in seen:
                    seen.add(image_id)
                    yield image_id
