"""Which images a report shows: those that were named, those that a query finds, or a sample that is always the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipelines import storage
from pipelines.errors import RequestError
from pipelines.report.sql import image_ids_of
from pipelines.results.matches import MatchTables
from pipelines.results.parts import PartTables
from pipelines.settings.sections import ReportSettings
from pipelines.sources.id_files import IdFile, is_id_file, names_shown, read_id_file
from pipelines.store.rows import rows_of, some_rows
from pipelines.store.store import Store

# Several of each, so that like can be compared with like.
MIN_IMAGES_PER_LABEL = 4

COLUMNS = ["image_id", "uri", "label", "width", "height", "grid_width", "grid_height", "embedding", "shard"]


@dataclass(frozen=True)
class Choice:
    """rows: COLUMNS of the images table, in the order in which they are shown. how: in words, for the page."""

    rows: pa.Table
    how: str
    messages: list[str]

    @property
    def image_ids(self) -> list[str]:
        return self.rows["image_id"].to_pylist()


def choose(
    store: Store,
    settings: ReportSettings,
    sample: int | None,
    images: Sequence[str],
    query: str | None,
    parts: Iterable[PartTables],
    matches: Iterable[MatchTables],
) -> Choice:
    """The images of a report.

    images: image_ids, or files that list them. query: SQL with a column image_id. Both: `sample` of what they name.

    Raises RequestError for images that are not in the store, a query that is wrong, and a store without images.
    """
    if images and query:
        raise RequestError("--images and --query both choose images: give one of them.")
    messages: list[str] = []
    if images or query:
        ids = image_ids_of(store, query) if query else _named(images, store)
        how = "found by a query" if query else "chosen by name"
        if sample is not None and sample < len(ids):
            kept = set(_by_hash(ids, settings.seed)[:sample])
            ids, how = [one for one in ids if one in kept], f"{how}, a sample of {len(ids):,}"
    else:
        ids = _sample(store, settings, sample or settings.sample, parts, matches)
        how = "a sample that is the same every time"
    if len(ids) > settings.most_images:
        messages.append(
            f"{len(ids):,} images were chosen, and the first {settings.most_images:,} of them are shown "
            "(report.most_images)."
        )
        ids = ids[: settings.most_images]
    rows = rows_of(store.images, ids, COLUMNS)
    places = {image_id: at for at, image_id in enumerate(rows["image_id"].to_pylist())}
    if missing := [one for one in ids if one not in places]:
        there = some_rows(store.images, ["image_id"], settings.seed)["image_id"]
        example = f"; an id that it has is {there[0].as_py()}" if len(there) else ""
        raise RequestError(
            f"{len(missing):,} of the images asked for are not in the store ({names_shown(missing)}){example}."
        )
    return Choice(rows.take(pa.array([places[one] for one in ids], pa.int64())), how, messages)


def _named(images: Sequence[str], store: Store) -> list[str]:
    kind = IdFile("images", "--images", "an image_id, or a .csv, .jsonl or .parquet file", {"image_id": "an image_id"})
    ids: list[str] = []
    for one in images:
        if is_id_file(one):
            ids += read_id_file(storage.normalise(one), kind, store.config.storage.options)[0].to_pylist()
        else:
            ids.append(one)
    if not ids:
        raise RequestError("--images names no image: give image_ids, or a file that lists some.")
    return list(dict.fromkeys(ids))


def _sample(
    store: Store,
    settings: ReportSettings,
    count: int,
    parts: Iterable[PartTables],
    matches: Iterable[MatchTables],
) -> list[str]:
    """Image ids by label and name. Some pairs that were matched first, then what has parts or matches, then others."""
    there = some_rows(store.images, ["image_id", "label"], settings.seed)
    labels = dict(zip(there["image_id"].to_pylist(), there["label"].to_pylist(), strict=True))
    if not labels:
        store.requires("a report", images=True)
    pairs: list[tuple[str, str]] = []
    for tables in matches:
        rows = some_rows(tables.pairs, ["image_a", "image_b"], settings.seed)
        pairs += zip(rows["image_a"].to_pylist(), rows["image_b"].to_pylist(), strict=True)
    preferred = {one for pair in pairs for one in pair}
    for two in parts:
        preferred.update(some_rows(two.images, ["image_id"], settings.seed)["image_id"].to_pylist())

    chosen: dict[str, None] = {}
    for pair in sorted(pairs, key=lambda pair: _hash("\0".join(pair), settings.seed)):
        if len(chosen) + 2 > count // 2:
            break
        if all(one in labels for one in pair):
            chosen.update(dict.fromkeys(pair))
    ordered = sorted(_by_hash(labels, settings.seed), key=lambda one: one not in preferred)
    for image_id in _across_labels(ordered, labels):
        if len(chosen) >= count:
            break
        chosen[image_id] = None
    return sorted(chosen, key=lambda one: (labels[one] is None, labels[one] or "", one))


def _across_labels(ordered: Sequence[str], labels: dict[str, str | None]) -> Iterable[str]:
    """Images of each label in turn, MIN_IMAGES_PER_LABEL at a time, so that no label comes with a single image."""
    of_label: dict[str | None, list[str]] = defaultdict(list)
    for image_id in ordered:
        of_label[labels[image_id]].append(image_id)
    taken = 0
    while any(len(ids) > taken for ids in of_label.values()):
        for ids in of_label.values():
            yield from ids[taken : taken + MIN_IMAGES_PER_LABEL]
        taken += MIN_IMAGES_PER_LABEL


def _by_hash(ids: Iterable[str], seed: int) -> list[str]:
    """In an order that has nothing to do with names and stays as it is when others join."""
    return sorted(ids, key=lambda image_id: _hash(image_id, seed))


def _hash(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode(errors="surrogatepass")).digest()
