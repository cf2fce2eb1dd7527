"""The bytes of listed images: many at once, containers read in few requests, passing errors tried again."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.sources.parquet_images import ROW_GROUPS, image_bytes
from pipelines.storage.filesystems import is_local, local_path, open_filesystem

REQUESTS_AT_ONCE = 16
# Neighbouring members of a tar are read together, up to this much.
MAX_JOINT_READ_BYTES = 32 * 2**20
MAX_IMAGE_FILE_BYTES = 512 * 10**6
# A gap of this size between members is cheaper to read than to skip.
MAX_GAP_BYTES_READ = 64 * 1024

_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_T = TypeVar("_T")


@dataclass
class Fetched:
    """The bytes of one image, or why there are none."""

    data: bytes | None = None
    error: Exception | None = None
    attempts: int = 1


def fetch(
    rows: pa.Table,
    *,
    storage_options: dict[str, Any] | None = None,
    attempts: int = 3,
    backoff_s: float = 0.5,
    max_bytes: int = MAX_IMAGE_FILE_BYTES,
) -> list[Fetched]:
    """Fetch listing rows, in order. Never raises for an image: its error is in its place.

    Errors that may pass (time-outs, resets, throttling, server errors, files that came short) are tried `attempts`
    times, waiting `backoff_s`, then twice as long, and so on. What has more than `max_bytes` is an error, unread.
    """
    images = _Images(rows.to_pylist(), storage_options, attempts, backoff_s, max_bytes)
    reads = list(images.reads())
    if all(is_local(source["container"] or source["uri"]) for source in images.sources):
        # A local disk gains nothing from threads.
        for read in reads:
            read()
    else:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(lambda read: read(), reads))
    return images.fetched


class _Images:
    """Listed images, and what was fetched of them so far.

    sources: rows of a listing. fetched: as many, in the same order. The other fields are arguments of `fetch`.
    """

    def __init__(
        self,
        sources: list[dict[str, Any]],
        storage_options: dict[str, Any] | None,
        attempts: int,
        backoff_s: float,
        max_bytes: int,
    ) -> None:
        self.sources = sources
        self.fetched = [Fetched() for _ in sources]
        self.storage_options = storage_options
        self.attempts = attempts
        self.backoff_s = backoff_s
        self.max_bytes = max_bytes

    def reads(self) -> Iterator[Callable[[], None]]:
        """One for each file, each run of a tar's members and each row group; images that are not read have errors."""
        tars: dict[str, list[int]] = defaultdict(list)
        row_groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for index, source in enumerate(self.sources):
            if source["error"]:
                self.fetched[index] = Fetched(None, FileNotFoundError(source["error"]))
            elif source["row_group"] is None and source["source_size"] > self.max_bytes:
                self.fetched[index] = Fetched(None, ValueError(_too_large(source["source_size"], self.max_bytes)))
            elif source["offset"] is not None:
                tars[source["container"]].append(index)
            elif source["row_group"] is not None:
                row_groups[source["container"], source["row_group"]].append(index)
            else:
                yield partial(self._read_file, index)
        for container, indices in tars.items():
            for run in _runs(indices, self.sources):
                yield partial(self._read_members, container, run)
        for (container, number), indices in row_groups.items():
            yield partial(self._read_row_group, container, number, indices)

    def _read_file(self, index: int) -> None:
        uri, listed = self.sources[index]["uri"], self.sources[index]["source_size"]

        def whole() -> bytes:
            data = _read(uri, self.storage_options, end=self.max_bytes + 1 if is_local(uri) else None)
            if len(data) < listed:
                raise OSError(_changed(listed, len(data)))
            return data

        data, error, tries = self._trying(whole)
        if data is not None and len(data) > listed >= 0:
            error = OSError(_changed(listed, len(data)))
            data = None
        self.fetched[index] = Fetched(data, error, tries)

    def _read_members(self, container: str, indices: list[int]) -> None:
        sources = [self.sources[index] for index in indices]
        start = sources[0]["offset"]
        end = max(source["offset"] + source["source_size"] for source in sources)
        whole, error, tries = self._trying(lambda: _read(container, self.storage_options, start, end))
        for index, source in zip(indices, sources, strict=True):
            begin = source["offset"] - start
            data = whole[begin : begin + source["source_size"]] if whole is not None else None
            short = data is not None and len(data) < source["source_size"]
            problem = OSError(f"{container} became shorter than when it was listed") if short else error
            self.fetched[index] = Fetched(None if short else data, problem, tries)

    def _read_row_group(self, container: str, number: int, indices: list[int]) -> None:
        first = self.sources[indices[0]]
        version, size = first["source_version"], first["source_size"]
        column, error, tries = self._trying(
            lambda: ROW_GROUPS.read(container, version, size, number, self.storage_options)
        )
        for index in indices:
            row = self.sources[index]["row"]
            data, problem = None, error
            if column is not None and row >= len(column):
                problem = OSError(f"{container} changed: it had a row {row} in this row group when it was listed")
            elif column is not None and (data := image_bytes(column, row)) is None:
                problem = ValueError("the row has no image bytes")
            self.fetched[index] = Fetched(data, problem, tries)

    def _trying(self, read: Callable[[], _T]) -> tuple[_T | None, Exception | None, int]:
        return _with_retries(read, self.attempts, self.backoff_s)


def _changed(listed: int, read: int) -> str:
    return f"the file changed: {listed} bytes when listed, {read} when read"


def _too_large(size: int, most: int) -> str:
    return f"the file has {size} bytes, more than the {most} that are read of one image (run.max_file_mb)"


def _runs(indices: list[int], sources: list[dict[str, Any]]) -> list[list[int]]:
    """Members of one tar that are read together: near each other and not too much at once."""
    ordered = sorted(indices, key=lambda i: sources[i]["offset"])
    runs: list[list[int]] = []
    for i in ordered:
        if runs:
            first, last = sources[runs[-1][0]], sources[runs[-1][-1]]
            gap = sources[i]["offset"] - last["offset"] - last["source_size"]
            length = sources[i]["offset"] + sources[i]["source_size"] - first["offset"]
            if gap <= MAX_GAP_BYTES_READ and length <= MAX_JOINT_READ_BYTES:
                runs[-1].append(i)
                continue
        runs.append([i])
    return runs


def _read(uri: str, storage_options: dict[str, Any] | None, start: int | None = None, end: int | None = None) -> bytes:
    if is_local(uri):
        with open(local_path(uri), "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))
    if start is not None and start == end:
        return b""  # object storage refuses a range without bytes
    fs, path = open_filesystem(uri, storage_options)
    return fs.cat_file(path, start=start, end=end)


def _with_retries(read: Callable[[], _T], attempts: int, backoff_s: float) -> tuple[_T | None, Exception | None, int]:
    for attempt in range(1, attempts + 1):
        try:
            return read(), None, attempt
        except _PERMANENT as error:
            return None, error, attempt
        except Exception as error:
            if attempt == attempts:
                return None, error, attempt
            time.sleep(backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("attempts is at least 1")
