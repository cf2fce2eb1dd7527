"""Tables as other programs, older versions or broken runs leave them: made and changed without a transaction."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.transaction import AddAction, RemoveAction

from pipelines.store.parquet import DataFile
from pipelines.store.table import Table, open_table


def made_table(uri: str, schema: pa.Schema) -> Table:
    """A table on a local disk, made where there is none."""
    statistics = {"delta.dataSkippingStatsColumns": schema.names[0]}
    DeltaTable.create(uri, schema=schema, mode="ignore", configuration=statistics)
    table = open_table(uri, schema)
    assert table is not None
    return table


def commit_by_hand(table: Table, add: Iterable[DataFile], remove: Iterable[str], run_id: str) -> None:
    """One commit to one table on a local disk. The table is refreshed."""
    now_ms = time.time_ns() // 1_000_000
    actions: list[Any] = [AddAction(file.path, file.size, {}, now_ms, True, _statistics(table, file)) for file in add]
    actions += [RemoveAction(path, True, now_ms) for path in remove]
    delta = DeltaTable(table.uri)
    delta.create_write_transaction(
        actions,
        mode="append",
        schema=delta.schema(),
        partition_by=[],
        commit_properties=CommitProperties(max_commit_retries=0, custom_metadata={"run_id": run_id}),
    )
    table.refresh()


def _statistics(table: Table, file: DataFile) -> str:
    statistics = {
        "numRecords": file.rows,
        "minValues": {table.key: file.min_id},
        "maxValues": {table.key: file.max_id},
        "nullCount": {table.key: 0},
    }
    return json.dumps(statistics)
