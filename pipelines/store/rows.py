"""The rows of a few images out of tables that may be huge: only files, row groups and columns that may hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.store.parquet import group_may_hold, open_parquet
from pipelines.store.table import Table

MOST_SAMPLED_FILES = 64
MOST_SAMPLED_ROWS_PER_FILE = 4_096


def rows_of(table: Table, keys: Iterable[str], columns: Sequence[str], files: Iterable[str] | None = None) -> pa.Table:
    """Rows whose key (the first column of the table, which its files are ordered by) is one of `keys`.

    files: those that hold all of them, where that is known; default: those whose range of keys allows for them.

    Raises JobError for a file that is gone.
    """
    wanted = sorted(set(keys))
    value_set = pa.array(wanted, pa.string())
    schema = pa.schema([table.schema.field(name) for name in columns])
    found = [schema.empty_table()]
    names = [path for path, file in table.files().items() if file.may_hold(wanted)] if files is None else files
    for name in sorted(names) if wanted else []:
        uri = storage.join(table.uri, name)
        with open_parquet(uri, table.options) as parquet:
            for group in range(parquet.num_row_groups):
                if not group_may_hold(parquet.metadata.row_group(group), wanted):
                    continue
                rows = parquet.read_row_group(group, columns=list(dict.fromkeys([table.key, *columns])))
                rows = rows.filter(pc.is_in(rows[table.key], value_set=value_set))
                found.append(rows.select(columns).cast(schema))
    return pa.concat_tables(found)


def some_rows(table: Table, columns: Sequence[str], seed: int) -> pa.Table:
    """Some columns of at most 64 x 4,096 rows, spread over the files: all rows of a table that has no more."""
    files = sorted(table.files())
    if len(files) > MOST_SAMPLED_FILES:
        files = [files[at * len(files) // MOST_SAMPLED_FILES] for at in range(MOST_SAMPLED_FILES)]
    schema = pa.schema([table.schema.field(name) for name in columns])
    found = [schema.empty_table()]
    for number, name in enumerate(files):
        rows = table.read_file(name, list(columns)).cast(schema)
        if len(rows) > MOST_SAMPLED_ROWS_PER_FILE:
            drawn = np.random.default_rng([seed, number]).choice(len(rows), MOST_SAMPLED_ROWS_PER_FILE, replace=False)
            rows = rows.take(pa.array(np.sort(drawn)))
        found.append(rows)
    return pa.concat_tables(found)


def row_count(table: Table) -> int:
    """How many rows a table has, as its log says."""
    return sum(file.rows for file in table.files().values())
