"""The bytes of listed images: many at once, containers read in few requests, passing errors tried again."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    sources = rows.to_pylist()
    results: list[Fetched] = [Fetched() for _ in sources]
    jobs: list[Callable[[], None]] = []
    tars: dict[str, list[int]] = defaultdict(list)
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)

    def trying(read: Callable[[], _T]) -> tuple[_T | None, Exception | None, int]:
        return _with_retries(read, attempts, backoff_s)

    def plain(index: int) -> None:
        source = sources[index]
        uri, listed = source["uri"], source["source_size"]

        def whole() -> bytes:
            data = _read(uri, storage_options, end=max_bytes + 1 if is_local(uri) else None)
            if len(data) < listed:
                raise OSError(_changed(listed, len(data)))
            return data

        data, error, tries = trying(whole)
        if data is not None and len(data) > listed >= 0:
            error = OSError(_changed(listed, len(data)))
            data = None
        results[index] = Fetched(data, error, tries)

    def members(container: str, indices: list[int]) -> None:
        start = sources[indices[0]]["offset"]
        end = max(sources[i]["offset"] + sources[i]["source_size"] for i in indices)
        whole, error, tries = trying(lambda: _read(container, storage_options, start, end))
        for i in indices:
            begin = sources[i]["offset"] - start
            data = whole[begin : begin + sources[i]["source_size"]] if whole is not None else None
            short = data is not None and len(data) < sources[i]["source_size"]
            problem = OSError(f"{container} became shorter than when it was listed") if short else error
            results[i] = Fetched(None if short else data, problem, tries)

    def group(container: str, number: int, indices: list[int]) -> None:
        version, size = sources[indices[0]]["source_version"], sources[indices[0]]["source_size"]
        column, error, tries = trying(lambda: ROW_GROUPS.read(container, version, size, number, storage_options))
        for i in indices:
            row = sources[i]["row"]
            data, problem = None, error
            if column is not None and row >= len(column):
                problem = OSError(f"{container} changed: it had a row {row} in this row group when it was listed")
            elif column is not None and (data := image_bytes(column, row)) is None:
                problem = ValueError("the row has no image bytes")
            results[i] = Fetched(data, problem, tries)

    for index, source in enumerate(sources):
        if source["error"]:
            results[index] = Fetched(None, FileNotFoundError(source["error"]))
        elif source["row_group"] is None and source["source_size"] > max_bytes:
            results[index] = Fetched(None, ValueError(_too_large(source["source_size"], max_bytes)))
        elif source["offset"] is not None:
            tars[source["container"]].append(index)
        elif source["row_group"] is not None:
            groups[source["container"], source["row_group"]].append(index)
        else:
            jobs.append(lambda index=index: plain(index))  # type: ignore[misc]
    for container, indices in tars.items():
        for run in _runs(indices, sources):
            jobs.append(lambda container=container, run=run: members(container, run))  # type: ignore[misc]
    for (container, number), indices in groups.items():
        jobs.append(lambda container=container, number=number, indices=indices: group(container, number, indices))  # type: ignore[misc]

    if all(is_local(source["container"] or source["uri"]) for source in sources):
        # A local disk gains nothing from threads.
        for job in jobs:
            job()
    else:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(lambda job: job(), jobs))
    return results


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
