"""Copies of a table's files: without some rows, changed, or several merged into one; whole keys in each row group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.store.parquet import (
    IMAGES_PER_ROW_GROUP,
    ROWS_PER_ROW_GROUP,
    DataFile,
    key_range,
    new_file,
    new_file_name,
    open_parquet,
    parquet_options,
)
from pipelines.store.table import Table


def merge_files(
    table: Table, files: Sequence[DataFile], name: str, change: Callable[[pa.Table], pa.Table] = lambda rows: rows
) -> DataFile:
    """Write the rows of `files` of `table` as one new file `name`; it shows only once committed.

    Rows with the same key keep the order that they have within and among the files. `change` maps all rows to those
    that are written, in the same order. Takes memory for the rows of all files, twice.
    """
    read = [table.read_file(file.path, table.schema.names).cast(table.schema) for file in files]
    rows = pa.concat_tables(read)
    # the sort is stable
    rows = change(rows.take(pc.sort_indices(rows[table.key])))
    uri = table.place(name)
    with (
        new_file(uri, table.options) as sink,
        pq.ParquetWriter(sink, table.schema, **parquet_options(table.schema)) as writer,
    ):
        for group in row_groups(rows, table.key):
            writer.write_table(group, row_group_size=len(group))
        writer.close()
        size = sink.tell()
    return DataFile(name, size, len(rows), *key_range(rows[table.key]))


def row_groups(rows: pa.Table, key: str) -> Iterator[pa.Table]:
    """Rows in key order, cut where a row group ends: after some 64 keys of many rows each, and whole keys only.

    Keys of one row each, as in images, fill row groups by rows.
    """
    keys = pc.run_end_encode(rows[key].combine_chunks())
    ends = np.asarray(keys.run_ends if isinstance(keys, pa.RunEndEncodedArray) else keys.chunk(0).run_ends, np.int64)
    begin, first = 0, 0
    many = IMAGES_PER_ROW_GROUP if len(rows) > len(ends) else ROWS_PER_ROW_GROUP
    for at, end in enumerate(ends):
        if at - first + 1 >= many or end - begin >= ROWS_PER_ROW_GROUP or at == len(ends) - 1:
            yield rows.slice(begin, int(end) - begin)
            begin, first = int(end), at + 1


def rewrite_without(table: Table, file: DataFile, image_ids: Iterable[str], run_id: str) -> DataFile | None:
    """A copy of a file of `table` without the rows of some images; None when nothing would be left."""
    return rewrite(table, file, run_id, lambda rows: _without(rows, image_ids))


def rewrite(table: Table, file: DataFile, run_id: str, change: Callable[[pa.Table], pa.Table]) -> DataFile | None:
    """A changed copy of a file, row group by row group, with our encodings; None when no row is left.

    `change` maps the rows of one row group to those that the copy has.
    """
    name = new_file_name(run_id)
    uri = table.place(name)
    kept = 0
    low, high = [], []
    with open_parquet(table.place(file.path), table.options) as parquet, new_file(uri, table.options) as sink:
        schema = table.schema
        with pq.ParquetWriter(sink, schema, **parquet_options(schema)) as writer:
            for index in range(parquet.num_row_groups):
                rows = change(parquet.read_row_group(index, columns=schema.names).cast(schema))
                if len(rows):
                    writer.write_table(rows, row_group_size=len(rows))
                    kept += len(rows)
                    bounds = pc.min_max(rows[table.key])
                    low.append(bounds["min"].as_py())
                    high.append(bounds["max"].as_py())
        size = sink.tell()
    if not kept:
        fs, path = storage.filesystem(uri, table.options)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)
        return None
    return DataFile(name, size, kept, min(low), max(high))


def _without(rows: pa.Table, image_ids: Iterable[str]) -> pa.Table:
    gone = pc.is_in(rows["image_id"], value_set=pa.array(list(image_ids), pa.string()))
    return rows.filter(pc.invert(gone))
