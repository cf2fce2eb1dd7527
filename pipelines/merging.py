"""Several small files of a table as one: rows in key order, row groups of whole keys, our encodings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.schemas import parquet_options
from pipelines.shards import IMAGES_PER_ROW_GROUP, ROWS_PER_ROW_GROUP
from pipelines.tables import DataFile, Table, key_range


def merge_files(
    table: Table, files: Sequence[DataFile], name: str, change: Callable[[pa.Table], pa.Table] = lambda rows: rows
) -> DataFile:
    """Write the rows of `files` of `table` as one new file `name`; it shows only once committed.

    Rows with the same key keep the order that they have within and among the files. `change` maps all rows to those
    that are written, in the same order. Takes memory for the rows of all files, twice.
    """
    read = [table.read_file(file.path).cast(table.schema) for file in files]
    rows = pa.concat_tables(read)
    rows = change(rows.take(pc.sort_indices(rows[table.key])))  # stable
    fs, path = storage.filesystem(storage.join(table.uri, name), table.options)
    with fs.open(path, "wb") as sink, pq.ParquetWriter(sink, table.schema, **parquet_options(table.schema)) as writer:
        for group in row_groups(rows, table.key):
            writer.write_table(group, row_group_size=len(group))
    return DataFile(name, fs.size(path), len(rows), *key_range(rows[table.key]))


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
