"""index/NAME in a store: a manifest, the FAISS files it names, and which rows their ids stand for.

Files are written under new names and the manifest last, so that a reader finds the old index or the new one, whole.

    manifest.json        what the index holds, of which spec and table version, and the names below
    RUN-vectors.faiss    the vectors, and for ivfpq RUN-lists.faiss: their compressed codes
    RUN-images.parquet   image_id, run_id, first_id, vectors: ids of an image follow each other
    RUN-cells.parquet    id, row, col, y, x of every patch, where patches are indexed
    RUN-ids.parquet      id, dead: of every vector in the FAISS files, in their order
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dino_ops.nearest import Kind, NearestIndex
from pipelines import storage
from pipelines.errors import JobError, RequestError
from pipelines.store import Store
from pipelines.tables import open_parquet

SCHEMA_VERSION = 1

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("run_id", pa.string()),  # of the extraction: another one is indexed anew
        ("first_id", pa.int64()),
        ("vectors", pa.int64()),  # 0 for an image of which no patch is stored
    ]
)
CELLS = pa.schema(
    [
        ("id", pa.int64()),
        ("row", pa.int32()),  # of the patch grid
        ("col", pa.int32()),
        ("y", pa.float32()),  # patch centre in pixels of the original image
        ("x", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """What an index holds."""

    of: str  # embeddings | pooled | patches
    pooling: str | None
    descriptor: str | None  # column of patches; None for embeddings
    kind: Kind
    why: str  # the kind was chosen
    dimension: int
    fingerprint: str  # of the store's spec
    images_version: int  # of the images table, which it covers
    images: int
    count: int  # vectors that a search can return
    dead: int  # removed vectors that still take space in a graph
    next_id: int
    run_id: str  # of the update that wrote it
    files: dict[str, str]
    metric: str = "cosine"
    schema_version: int = SCHEMA_VERSION

    @property
    def holds(self) -> dict[str, str | None]:
        """The settings that an index has for life."""
        return {"of": self.of, "pooling": self.pooling, "descriptor": self.descriptor}


@dataclass
class IndexContent:
    """An index in memory. images: IMAGES rows in ascending first_id. cells: CELLS in ascending id, or None."""

    nearest: NearestIndex
    images: pa.Table
    cells: pa.Table | None
    next_id: int = field(default=0)


def index_uri(store: str, name: str) -> str:
    """Raises RequestError for a name that is no folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RequestError(f"NAME {name!r} is not a name: give letters, digits, '.', '_' and '-'.")
    return storage.join(store, "index", name)


def index_names(store: Store) -> list[str]:
    """Names of the indices of a store."""
    fs, path = storage.filesystem(storage.join(store.uri, "index"), store.config.storage.options)
    try:
        names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return [name for name in names if fs.exists(f"{path}/{name}/manifest.json")]


def read_manifest(store: Store, name: str) -> Manifest | None:
    """The manifest of an index, or None when there is none yet.

    Raises RequestError for an index of another spec or a newer dinoray, JobError for a damaged one.
    """
    uri = index_uri(store.uri, name)
    content = storage.read_json(storage.join(uri, "manifest.json"), store.config.storage.options)
    if content is None:
        return None
    if content.get("schema_version", 0) > SCHEMA_VERSION:
        raise RequestError(f"The index {name} was written by a newer dinoray: update dinoray.")
    try:
        manifest = Manifest(**content)
    except TypeError:
        raise JobError(f"{uri}/manifest.json is damaged: remove the folder and run `dinoray index` again.") from None
    if manifest.fingerprint != store.fingerprint:
        raise RequestError(
            f"The index {name} was made of features of another spec ({manifest.fingerprint}, the store has "
            f"{store.fingerprint}): remove {uri} and run `dinoray index` again."
        )
    return manifest


def read_content(store: Store, name: str, manifest: Manifest) -> IndexContent:
    """The index that a manifest names. Raises JobError when a file of it is gone."""
    uri, options = index_uri(store.uri, name), store.config.storage.options
    try:
        parts = {
            part: _read_faiss(storage.join(uri, file), options)
            for part, file in manifest.files.items()
            if file.endswith(".faiss")
        }
        tables = {
            part: _read_parquet(storage.join(uri, file), options)
            for part, file in manifest.files.items()
            if file.endswith(".parquet")
        }
    except FileNotFoundError as error:
        raise JobError(
            f"{error.filename or uri} is gone: the index {name} was updated at this moment or is damaged; "
            f"run the same command again, or remove {uri} and run `dinoray index` again."
        ) from None
    ids, dead = tables["ids"]["id"].to_numpy(), tables["ids"]["dead"].to_numpy()
    nearest = NearestIndex(manifest.kind, manifest.dimension, parts, ids, ids[dead])
    return IndexContent(nearest, tables["images"], tables.get("cells"), manifest.next_id)


def write_content(store: Store, name: str, content: IndexContent, run_id: str, files: dict[str, str]) -> None:
    """Write the files of an index into `files`, by part; nobody sees them before the manifest names them."""
    uri, options = index_uri(store.uri, name), store.config.storage.options
    nearest = content.nearest
    for part, index in nearest.parts.items():
        files[part] = f"{run_id}-{part}.faiss"
        _write_faiss(index, storage.join(uri, files[part]), options)
    ids = pa.table({"id": nearest.ids, "dead": np.isin(nearest.ids, nearest.dead)})
    tables = {"images": content.images, "ids": ids} | ({} if content.cells is None else {"cells": content.cells})
    for part, table in tables.items():
        files[part] = f"{run_id}-{part}.parquet"
        fs, path = storage.filesystem(storage.join(uri, files[part]), options)
        with fs.open(path, "wb") as sink:
            pq.write_table(table, sink, compression="zstd")


def publish(store: Store, name: str, manifest: Manifest, before: Manifest | None) -> None:
    """Make an index visible, then remove the files of the one before.

    Raises JobError when another run updated it since `before` was read.
    """
    uri, options = index_uri(store.uri, name), store.config.storage.options
    if read_manifest(store, name) != before:
        remove_files(store, name, set(manifest.files.values()))
        raise JobError(f"Another run updated the index {name} at the same time: run the same command again.")
    storage.write_json(storage.join(uri, "manifest.json"), asdict(manifest), options)
    if before is not None:
        remove_files(store, name, set(before.files.values()) - set(manifest.files.values()))


def remove_files(store: Store, name: str, files: set[str]) -> None:
    uri, options = index_uri(store.uri, name), store.config.storage.options
    for file in sorted(files):
        fs, path = storage.filesystem(storage.join(uri, file), options)
        if fs.exists(path):
            fs.rm_file(path)


def unnamed_files(store: Store, name: str, manifest: Manifest | None, before: str) -> set[str]:
    """Files that a killed run left: no manifest names them, and the run began before the run_id `before`."""
    fs, path = storage.filesystem(index_uri(store.uri, name), store.config.storage.options)
    try:
        present = {entry.rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)}
    except FileNotFoundError:
        return set()
    named = set() if manifest is None else set(manifest.files.values())
    return {file for file in present - named if file.endswith((".faiss", ".parquet")) and file < before}


def _read_parquet(uri: str, options: storage.Options) -> pa.Table:
    with open_parquet(uri, options) as parquet:
        return parquet.read()


def _read_faiss(uri: str, options: storage.Options) -> Any:
    import faiss

    fs, path = storage.filesystem(uri, options)
    if not fs.exists(path):
        raise FileNotFoundError(2, "no such file", uri)
    if storage.is_local(uri):
        return faiss.read_index(path)
    with _temporary_file() as copy:
        fs.get_file(path, copy)
        return faiss.read_index(copy)


def _write_faiss(index: Any, uri: str, options: storage.Options) -> None:
    """FAISS writes to a path only; a file of gigabytes is not held in memory a second time."""
    import faiss

    fs, path = storage.filesystem(uri, options)
    if storage.is_local(uri):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, path)
        return
    with _temporary_file() as copy:
        faiss.write_index(index, copy)
        fs.put_file(copy, path)


@contextmanager
def _temporary_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dinoray-index-") as folder:
        yield f"{folder}/index.faiss"
