"""index/NAME in a store: a manifest, the segments it names, and which rows their ids stand for.

Files are written under new names, and a transaction says which manifest counts (pipelines.results.index_publishing), so
that a reader finds the old index or the new one, whole.

    manifest-N.json      what the index holds, of which spec and table version, which files; in indices from before
                         transactions the highest N counts
    RUN-vectors.faiss    the vectors of a segment, and for ivfpq RUN-lists.faiss: their compressed codes
    RUN-images.parquet   image_id, run_id, first_id, vectors: ids of an image follow each other, as its vectors do
    RUN-cells.parquet    id, row, col, y, x of every patch, where patches are indexed
    RUN-dead.parquet     first_id, vectors of the images that were taken out and still lie in a segment

The first segment is the base, of the index's kind. The others are small flat indices of what came later: an update
writes one, and neither reads nor writes the base until they are merged into it (pipelines.index.update).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dino_ops.nearest import Kind, NearestIndex, estimate_bytes
from pipelines import storage
from pipelines.errors import JobError, RequestError
from pipelines.results.faiss_files import read_faiss, write_faiss
from pipelines.results.names import result_names, result_uri
from pipelines.storage.errors import reaching, said
from pipelines.store.changes import Pointer
from pipelines.store.checksums import checksum_of
from pipelines.store.damage import DamagedResult, damaged, gone
from pipelines.store.parquet import DamagedFile, MissingFile, open_parquet, why_unreadable
from pipelines.store.snapshots import Snapshot, snapshot
from pipelines.store.store import Store

SCHEMA_VERSION = 2
# Of manifests that count without a transaction that says so.
VERSION_BEFORE_TRANSACTIONS = 1
READS_AT_ONCE = 16

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("run_id", pa.string()),
        ("first_id", pa.int64()),
        ("vectors", pa.int64()),
    ]
)
"""run_id: the extraction's; after another one the image is indexed again. first_id: no other image has it, and an image
without vectors has one, too. vectors: how many; 0 for an image without stored patches."""
CELLS = pa.schema(
    [
        ("id", pa.int64()),
        ("row", pa.int32()),
        ("col", pa.int32()),
        ("y", pa.float32()),
        ("x", pa.float32()),
    ]
)
"""row, col: the patch's place in the grid. y, x: its centre in pixels of the original image."""
DEAD = pa.schema([("first_id", pa.int64()), ("vectors", pa.int64())])

_MANIFEST = re.compile(r"manifest-(\d+)\.json")
_OURS = re.compile(rf"\d{{8}}T\d{{6}}Z-[0-9a-f]{{6}}-\w+\.(faiss|parquet)|{_MANIFEST.pattern}(\.\w+\.partial)?")


@dataclass(frozen=True)
class Segment:
    """A FAISS index and the rows of its images, as stored; its ids are below those of later segments.

    first_id: the lowest. images, vectors: how many, dead ones included. files: piece -> name of its file. checksums:
    of the files that FAISS wrote, by name; none of indices from before there were any.
    """

    kind: Kind
    first_id: int
    images: int
    vectors: int
    files: dict[str, str]
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What an index holds.

    number: the manifest's own; every update has a higher one. of: embeddings, pooled or patches. descriptor: a column
    of patches; None for embeddings. why: the reason for the kind. fingerprint: of the store's spec. images_version,
    images_files: of the images table that the index covers. count: vectors that a search can return. dead: removed
    vectors that still take space. run_id: of the update that wrote the manifest.
    """

    number: int
    of: str
    pooling: str | None
    descriptor: str | None
    kind: Kind
    why: str
    dimension: int
    fingerprint: str
    images_version: int
    images_files: list[str]
    images: int
    count: int
    dead: int
    next_id: int
    run_id: str
    segments: list[Segment]
    dead_file: str | None = None
    metric: str = "cosine"
    schema_version: int = SCHEMA_VERSION

    @property
    def holds(self) -> dict[str, str | None]:
        """The settings that an index has for life."""
        return {"of": self.of, "pooling": self.pooling, "descriptor": self.descriptor}

    @property
    def files(self) -> set[str]:
        """Every file that it names."""
        named = {file for segment in self.segments for file in segment.files.values()}
        return named | ({self.dead_file} if self.dead_file else set())

    @property
    def memory_bytes(self) -> int:
        """Estimate of what the index takes in a search."""
        return sum(estimate_bytes(one.kind, one.vectors, self.dimension) for one in self.segments)


@dataclass
class Part:
    """A segment in memory. images: IMAGES rows in ascending first_id. cells: CELLS in ascending id, or None."""

    nearest: NearestIndex
    images: pa.Table
    cells: pa.Table | None


def index_uri(store: str, name: str) -> str:
    """Raises RequestError for a name that cannot be a folder's."""
    return result_uri(store, "index", name)


def index_path(name: str) -> str:
    """Where an index lies below its store, which is what the store's log calls it."""
    return f"index/{name}"


def index_names(store: Store) -> list[str]:
    """Names of the indices of a store, also of those whose manifest is gone."""
    names, current = result_names(store.uri, "index", store.config.storage.options), snapshot(store.log)
    return [name for name in names if valid_manifest(store, name, current)]


def begun_indices(store: Store, current: Snapshot) -> list[str]:
    """Paths of folders that hold no index, and perhaps files of a first run that was killed or is at work."""
    names = result_names(store.uri, "index", store.config.storage.options)
    return [index_path(name) for name in names if not valid_manifest(store, name, current)]


def files_present(store: Store, name: str) -> set[str]:
    """Every file in the folder of an index."""
    fs, path = storage.filesystem(index_uri(store.uri, name), store.config.storage.options)
    try:
        return {entry.rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def valid_manifest(store: Store, name: str, current: Snapshot | None = None) -> str:
    """The name of the manifest that counts; "" where there is no index.

    current: default the newest snapshot.
    """
    pointer = _pointer(store, name, current)
    present = files_present(store, name)
    if pointer:
        # a folder that somebody removed is an index that is not there
        return pointer.file.rpartition("/")[2] if present else ""
    for number in sorted(_numbers(present), reverse=True):
        if _counts_by_itself(store, name, manifest_file(number)):
            return manifest_file(number)
    return ""


def _counts_by_itself(store: Store, name: str, file: str) -> bool:
    """Whether a manifest to which the log does not point is from before transactions, or damaged, as whoever reads it
    says. Any other one is of a first run that is at work or was killed."""
    try:
        content = storage.read_json(_uri(store, name, file), store.config.storage.options) or {}
    except JobError:
        return True
    return content.get("schema_version", 0) <= VERSION_BEFORE_TRANSACTIONS


def read_manifest(store: Store, name: str, current: Snapshot | None = None) -> Manifest | None:
    """The manifest of an index, or None when there is none yet.

    current: default the newest snapshot.

    Raises RequestError for an index of another spec or a newer dinoray, JobError for a damaged one.
    """
    file = valid_manifest(store, name, current)
    if not file:
        return None
    pointer = _pointer(store, name, current)
    manifest = read_manifest_file(store, name, file, pointer.checksum if pointer else None)
    if manifest is None:
        uri = index_uri(store.uri, name)
        raise DamagedResult(gone(f"{uri}/{file}", store.uri))
    return manifest


def read_manifest_file(store: Store, name: str, file: str, expected: str | None = None) -> Manifest | None:
    """A manifest, or None when it is not there. expected: its checksum, where that is known. Raises as above."""
    uri, options = index_uri(store.uri, name), store.config.storage.options
    fs, path = storage.filesystem(storage.join(uri, file), options)
    try:
        with reaching(uri):
            data = fs.cat_file(path)
    except FileNotFoundError:
        return None
    if expected is not None and checksum_of(data) != expected:
        raise DamagedFile(f"{uri}/{file}", "its bytes are not those that were written")
    try:
        content = json.loads(data)
        if content.get("schema_version", 0) > SCHEMA_VERSION:
            raise RequestError(f"The index {name} was written by a newer dinoray: update dinoray.")
        manifest = Manifest(**content | {"segments": [Segment(**one) for one in content["segments"]]})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RequestError):
            raise
        raise DamagedFile(f"{uri}/{file}", said(error)) from None
    if foreign := sorted(str(name) for name in manifest.files if not is_ours(str(name))):
        raise DamagedFile(f"{uri}/{file}", f"it names a file that no index has, {foreign[0]!r}")
    if manifest.fingerprint != store.fingerprint:
        raise RequestError(
            f"The index {name} was made of features of another spec ({manifest.fingerprint}, the store has "
            f"{store.fingerprint}): remove {uri} and run `dinoray index` again."
        )
    return manifest


def read_replaced_manifest(store: Store, name: str, manifest: Manifest) -> Manifest | None:
    """The manifest that this one replaced, whose files are kept for searches that are reading them."""
    before = highest_number(files_present(store, name), below=manifest.number)
    return read_manifest_file(store, name, manifest_file(before)) if before else None


def read_dead(store: Store, name: str, manifest: Manifest) -> pa.Table:
    """DEAD rows of an index."""
    if manifest.dead_file is None:
        return DEAD.empty_table()
    with _explained(store, name):
        return read_file(store, name, manifest.dead_file)


def read_images(store: Store, name: str, segments: Sequence[Segment]) -> pa.Table:
    """IMAGES rows of some segments, those of dead images too."""
    files = [segment.files["images"] for segment in segments]
    with _explained(store, name):
        return pa.concat_tables([IMAGES.empty_table(), *_at_once(lambda file: read_file(store, name, file), files)])


def read_part(store: Store, name: str, manifest: Manifest, segment: Segment, dead: pa.Table) -> Part:
    """A segment in memory, what DEAD rows name taken out of its answers. Raises JobError when a file of it is gone."""
    with _explained(store, name):
        pieces = {
            piece: read_file(store, name, file, segment.checksums.get(file)) for piece, file in segment.files.items()
        }
    images, cells = pieces.pop("images"), pieces.pop("cells", None)
    nearest = NearestIndex(segment.kind, manifest.dimension, pieces, ids_of(images), np.zeros(0, np.int64))
    if len(dead):
        nearest.remove(ids_of(dead))
    return Part(nearest, images, cells)


def read_parts(store: Store, name: str, manifest: Manifest, dead: pa.Table) -> list[Part]:
    """All segments of an index, what DEAD rows name taken out of their answers."""
    return _at_once(lambda segment: read_part(store, name, manifest, segment, dead), manifest.segments)


def read_file(store: Store, name: str, file: str, expected: str | None = None) -> Any:
    """A file of an index: a FAISS index, or a table. expected: the checksum of the former, where it is known.

    Raises FileNotFoundError, DamagedFile, and what the readers raise.
    """
    uri, options = _uri(store, name, file), store.config.storage.options
    if file.endswith(".faiss"):
        return read_faiss(uri, options, expected)
    with open_parquet(uri, options) as parquet:
        rows = parquet.read()
    if not any(rows.schema.equals(schema) for schema in (IMAGES, CELLS, DEAD)):
        raise DamagedFile(uri, f"it has other columns than an index has ({', '.join(rows.schema.names)})")
    return rows


def without_dead(images: pa.Table, dead: pa.Table) -> pa.Table:
    """IMAGES rows that DEAD rows do not name."""
    if not len(dead):
        return images
    return images.filter(pc.invert(pc.is_in(images["first_id"], value_set=dead["first_id"].combine_chunks())))


def ids_of(images: pa.Table) -> np.ndarray:
    """The ids of all vectors of IMAGES or DEAD rows: (sum of vectors,) int64."""
    first_ids, counts = images["first_id"].to_numpy(), images["vectors"].to_numpy()
    begins = np.cumsum(counts) - counts
    return np.repeat(first_ids - begins, counts) + np.arange(int(counts.sum()))


def write_part(store: Store, name: str, part: Part, run_id: str, files: set[str]) -> Segment:
    """Write a segment, its files named in `files` before; no reader sees them before a manifest names them."""
    options, nearest = store.config.storage.options, part.nearest
    tables = {"images": part.images} | ({} if part.cells is None else {"cells": part.cells})
    named = {piece: f"{run_id}-{piece}.faiss" for piece in nearest.parts}
    named |= {piece: f"{run_id}-{piece}.parquet" for piece in tables}
    files |= set(named.values())
    checksums = {
        named[piece]: write_faiss(index, _uri(store, name, named[piece]), options)
        for piece, index in nearest.parts.items()
    }
    for piece, table in tables.items():
        _write_parquet(table, _uri(store, name, named[piece]), options)
    return Segment(
        nearest.kind, part.images["first_id"][0].as_py(), len(part.images), len(nearest.ids), named, checksums
    )


def write_dead(store: Store, name: str, dead: pa.Table, run_id: str, files: set[str]) -> str:
    """Write DEAD rows; the name of their file."""
    file = f"{run_id}-dead.parquet"
    files.add(file)
    _write_parquet(dead, _uri(store, name, file), store.config.storage.options)
    return file


def manifest_file(number: int) -> str:
    return f"manifest-{number}.json"


def highest_number(files: set[str], below: float = math.inf) -> int:
    """Of manifests among some files; 0 where there is none."""
    return max((number for number in _numbers(files) if number < below), default=0)


def _numbers(files: set[str]) -> list[int]:
    return [int(found[1]) for file in files if (found := _MANIFEST.fullmatch(file))]


def manifest_json(manifest: Manifest) -> bytes:
    """What the file of a manifest holds."""
    return json.dumps(asdict(manifest), indent=1, ensure_ascii=False).encode()


def is_ours(file: str) -> bool:
    """Whether a file is one that a run writes, whole or half."""
    return _OURS.fullmatch(file) is not None


def remove_files(store: Store, name: str, files: set[str]) -> None:
    for file in sorted(files):
        fs, path = storage.filesystem(_uri(store, name, file), store.config.storage.options)
        if fs.exists(path):
            fs.rm_file(path)


def _pointer(store: Store, name: str, current: Snapshot | None) -> Pointer | None:
    return (current or snapshot(store.log)).pointers.get(index_path(name))


def _uri(store: Store, name: str, file: str) -> str:
    return storage.join(index_uri(store.uri, name), file)


def _at_once(read: Any, items: Sequence[Any]) -> list[Any]:
    if len(items) < 2:
        return [read(item) for item in items]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return list(pool.map(read, items))


@contextmanager
def _explained(store: Store, name: str) -> Iterator[None]:
    """Raises JobError for a file that is gone or damaged."""
    uri = index_uri(store.uri, name)
    try:
        yield
    except FileNotFoundError as error:
        if isinstance(error, MissingFile):
            raise
        raise DamagedResult(gone(str(error.filename or uri), store.uri)) from None
    except (RuntimeError, pa.ArrowException) as error:
        # FAISS raises RuntimeError
        raise DamagedResult(damaged(f"A file of {uri}", why_unreadable(error), store.uri)) from None


def _write_parquet(table: pa.Table, uri: str, options: storage.Options) -> None:
    fs, path = storage.filesystem(uri, options)
    with fs.open(path, "wb") as sink:
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
