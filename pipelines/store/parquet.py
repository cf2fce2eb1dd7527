"""Parquet files of a store's tables: how they are encoded, written, opened and described."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import JobError
from pipelines.storage.errors import failed_storage, said
from pipelines.storage.files import filesystem, join
from pipelines.storage.filesystems import Options, is_local
from pipelines.store.damage import damaged, gone
from pipelines.store.schemas import wrong_type


class DamagedFile(JobError, OSError):
    """A file of a store that is there and cannot be read: cut short, overwritten, or with bits that flipped.

    found: what its reader says of it.
    """

    def __init__(self, uri: str, found: str) -> None:
        super().__init__(damaged(uri, found))
        self.uri = uri
        self.found = found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri, self.found)


_FILE_NAME = re.compile(r"part-(?P<run_id>.+)-[0-9a-f]{12}\.parquet")


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of a table, with the statistics that its log entry carries.

    path: relative to the table. size: in bytes.
    """

    path: str
    size: int
    rows: int
    min_id: str
    max_id: str

    def may_hold(self, sorted_ids: Sequence[str]) -> bool:
        """Whether any of `sorted_ids` lies in this file's key range."""
        return _any_between(sorted_ids, self.min_id, self.max_id)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class MissingFile(JobError, FileNotFoundError):
    """A file that a log names and that is not there."""

    def __init__(self, uri: str) -> None:
        super().__init__(gone(uri))
        self.uri = uri

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri,)


def group_may_hold(row_group: Any, sorted_ids: Sequence[str]) -> bool:
    """Whether any of `sorted_ids` lies in the key range of a row group, as its metadata say."""
    statistics = row_group.column(0).statistics
    if statistics is None or not statistics.has_min_max:
        return True
    return _any_between(sorted_ids, statistics.min, statistics.max)


def _any_between(sorted_ids: Sequence[str], low: str, high: str) -> bool:
    at = bisect_left(sorted_ids, low)
    return at < len(sorted_ids) and sorted_ids[at] <= high


def write_parquet(
    table: str, name: str, rows: pa.Table, options: Options | None = None, row_group_rows: int | None = None
) -> DataFile:
    """Write rows, in the order of their first column, as a file of the table at `table`, for its log to name later."""
    uri = join(table, name)
    with new_file(uri, options) as sink:
        pq.write_table(rows, sink, row_group_size=row_group_rows, **parquet_options(rows.schema))
        size = sink.tell()
    return DataFile(name, size, len(rows), *key_range(rows[0]))


@contextlib.contextmanager
def new_file(uri: str, options: Options | None = None) -> Iterator[Any]:
    """A file under a name that nobody else uses, to write to; gone again where writing ends with an error.

    Its size is where writing ended: the file itself may be swept by the time it is closed, if nobody keeps leftovers.
    """
    fs, path = filesystem(uri, options)
    if is_local(uri):
        # the table may not have been created yet
        os.makedirs(path.rpartition("/")[0], exist_ok=True)
    try:
        with fs.open(path, "wb") as sink:
            yield sink
    except BaseException:
        with contextlib.suppress(Exception):  # what stays is garbage, and the error counts
            fs.rm_file(path)
        raise


def described(table: str, path: str, options: Options | None = None) -> DataFile | None:
    """A file of the table at `table` that its log does not name, by its footer; None for one that is gone, damaged or
    empty."""
    uri = join(table, path)
    fs, place = filesystem(uri, options)
    try:
        with open_parquet(uri, options) as parquet:
            footer = parquet.metadata
        size = fs.size(place)
    except (FileNotFoundError, DamagedFile):
        return None
    statistics = [footer.row_group(index).column(0).statistics for index in range(footer.num_row_groups)]
    if not statistics or not all(one is not None and one.has_min_max for one in statistics):
        return None
    low, high = min(one.min for one in statistics), max(one.max for one in statistics)
    return DataFile(path, size, footer.num_rows, low, high)


@contextlib.contextmanager
def open_parquet(uri: str, options: Options | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file on any storage, through `checked_parquet`, for as long as it is read.

    Raises:
        DamagedFile: its footer, or a page that is read, is not what was written.
        MissingFile: there is none.
    """
    try:
        with damage_explained(uri):
            if is_local(uri):
                with checked_parquet(uri) as parquet:
                    yield parquet
                return
            fs, path = filesystem(uri, options)
            with fs.open(path, "rb") as source, checked_parquet(source) as parquet:
                yield parquet
    except MissingFile:
        raise
    except FileNotFoundError:
        raise MissingFile(uri) from None


def checked_parquet(source: Any, *, pre_buffer: bool = False) -> pq.ParquetFile:
    """A Parquet file through Arrow's plain reader, which compares pages with their checksums, where they have any.

    Arrow's dataset reader, which pq.read_table uses too, lets go of Python's files in threads of its own, now and then
    after the interpreter has gone, which aborts a process that has done all its work.
    """
    return _CheckedFile(source, page_checksum_verification=True, pre_buffer=pre_buffer)


class _CheckedFile(pq.ParquetFile):
    """A file whose columns are those that are asked for: Arrow passes over one that a damaged footer calls otherwise.

    Raises ArrowInvalid for others, and for a footer that gives columns another type than they have in our tables.
    """

    def __init__(self, source: Any, **options: Any) -> None:
        super().__init__(source, **options)
        if wrong := wrong_type(self.schema_arrow):
            self.close()
            raise pa.ArrowInvalid(wrong)

    def read(self, columns: list[str] | None = None, **more: Any) -> pa.Table:
        self._check(columns)
        return super().read(columns, **more)

    def read_row_group(self, i: int, columns: list[str] | None = None, **more: Any) -> pa.Table:
        self._check(columns)
        return super().read_row_group(i, columns, **more)

    def _check(self, columns: list[str] | None) -> None:
        there = set(self.schema_arrow.names)
        lacking = [name for name in columns or () if name not in there and name.partition(".")[0] not in there]
        if lacking:
            raise pa.ArrowInvalid(f"it has no column {lacking[0]}")


@contextlib.contextmanager
def damage_explained(uri: str) -> Iterator[None]:
    """Raises DamagedFile for what Arrow says of a file that it cannot read; errors of the storage pass through."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        of_the_system = isinstance(error, OSError) and error.errno is not None
        if of_the_system or isinstance(error, DamagedFile) or failed_storage(error):
            raise
        raise DamagedFile(uri, said(error)) from None


def why_unreadable(error: Exception) -> str:
    """What a reader says of a file, on one line, to stand in a sentence that names the file."""
    return error.found if isinstance(error, DamagedFile) else said(error)


def key_range(image_ids: pa.ChunkedArray) -> tuple[str, str]:
    """Smallest and largest image_id, in the byte order that statistics use."""
    bounds = pc.min_max(image_ids)
    return bounds["min"].as_py(), bounds["max"].as_py()


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """pyarrow's writer settings for a table of ours (choices measured by `make bench`).

    Dictionaries on strings and on int8 values, which Parquet would store as four bytes (on floats they slow reads
    threefold), statistics on scalars only (those of lists and pictures are useless and cost time), bytes of floats
    split so that zstd finds the zeros of half-precision values. Pages carry a CRC32, which costs some percent of
    writing and of reading.
    """
    lists = [field for field in schema if pa.types.is_list(field.type)]
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    small_integers = [f"{f.name}.list.element" for f in lists if pa.types.is_int8(f.type.value_type)]
    scalars = [
        field.name for field in schema if not pa.types.is_list(field.type) and not pa.types.is_binary(field.type)
    ]
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": strings + small_integers,
        "use_byte_stream_split": [f"{f.name}.list.element" for f in lists if pa.types.is_float32(f.type.value_type)],
        "write_statistics": scalars,
        "write_page_checksum": True,
        # the Arrow schema would only repeat Parquet's
        "store_schema": False,
    }


IMAGES_PER_ROW_GROUP = 64
# Bounds the memory where a stride makes thousands of patches an image.
ROWS_PER_ROW_GROUP = 32_768


def run_id_of(path: str) -> str:
    """The run in the name of a file that `new_file_name` named; "" for another one."""
    match = _FILE_NAME.fullmatch(path)
    return match["run_id"] if match else ""


def new_file_name(run_id: str) -> str:
    """A unique name, which says which run wrote the file."""
    return f"part-{run_id}-{uuid.uuid4().hex[:12]}.parquet"
