"""FAISS indices as files on any storage. FAISS itself reads and writes paths of local files only."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.store.checksums import checksum, read_checked


def read_faiss(uri: str, options: storage.Options, expected: str | None) -> Any:
    """The index in a file, whose checksum is to be `expected`, where that is known.

    Raises FileNotFoundError, DamagedFile, and RuntimeError, which is FAISS's own.
    """
    import faiss

    fs, path = storage.filesystem(uri, options)
    if not fs.exists(path):
        raise FileNotFoundError(2, "no such file", uri)
    if storage.is_local(uri):
        return read_checked(uri, path, expected, faiss.read_index)
    with _temporary_file() as copy:
        fs.get_file(path, copy)
        return read_checked(uri, copy, expected, faiss.read_index)


def write_faiss(index: Any, uri: str, options: storage.Options) -> str:
    """Write an index; the checksum of its file, which is not held in memory: it may have gigabytes."""
    import faiss

    fs, path = storage.filesystem(uri, options)
    if storage.is_local(uri):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, path)
        return checksum(path)
    with _temporary_file() as copy:
        faiss.write_index(index, copy)
        fs.put_file(copy, path)
        return checksum(copy)


@contextmanager
def _temporary_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dinoray-index-") as folder:
        yield f"{folder}/index.faiss"
