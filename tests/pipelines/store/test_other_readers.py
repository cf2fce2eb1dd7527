"""Conditions on any column through Delta readers of others find the rows that are there."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.types
import pytest
from deltalake import DeltaTable
from hand_made import add_failure, add_images, source
from small_runs import settings
from tables_by_hand import commit_by_hand, made_table

from pipelines.store.schemas import ASSIGNMENTS, MATCHES, PAIRS, PARTS_PATCHES
from pipelines.store.store import Store
from pipelines.upkeep import compact

SCHEMAS = {"assignments": ASSIGNMENTS, "matches": MATCHES, "pairs": PAIRS, "part_patches": PARTS_PATCHES}
ID_COLUMN = 0


@pytest.fixture
def store(tmp_path: Path) -> Path:
    made = Store.create(str(tmp_path / "store"), settings())
    for run, images in enumerate((["a.jpg", "b.jpg"], ["c.jpg"])):
        rows = [{**source(name, at), "label": name[0]} for at, name in enumerate(images)]
        add_images(made, f"20260101T00000{run}Z-00000{run}", rows)
    add_failure(made, "20260101T000000Z-000000", "d.jpg")
    for name, schema in SCHEMAS.items():
        columns = [_values(field.type, at == ID_COLUMN) for at, field in enumerate(schema)]
        table = made_table(str(tmp_path / "store" / name), schema)
        commit_by_hand(table, [table.write_file("part-x.parquet", pa.table(columns, schema=schema))], [], "x")
    return tmp_path / "store"


def _values(kind: pa.DataType, is_id: bool) -> pa.Array:
    texts = pa.types.is_string(kind)
    return pa.array(["a.jpg", "b.jpg"] if texts and is_id else ["x", "y"] if texts else [1, 2], kind)


def found(table: Path) -> dict[str, tuple[int, int]]:
    """column -> rows that DuckDB and Polars find for equality with the first row's value; -1: it is a list."""
    rows = DeltaTable(table).to_pyarrow_table()
    connection, result = duckdb.connect(), {}
    connection.register("t", DeltaTable(table).to_pyarrow_dataset())
    for column in rows.column_names:
        value = rows[column][0].as_py()
        if isinstance(value, list) or value is None or pyarrow.types.is_floating(rows[column].type):
            continue
        (count,) = connection.execute(f'SELECT count(*) FROM t WHERE "{column}" = ?', [value]).fetchall()[0]
        result[column] = (count, pl.scan_delta(str(table)).filter(pl.col(column) == value).collect().height)
    return result


def expected(table: Path) -> dict[str, tuple[int, int]]:
    rows = DeltaTable(table).to_pyarrow_table().to_pydict()
    return {column: (values.count(values[0]),) * 2 for column, values in rows.items()}


@pytest.mark.parametrize("name", ["images", "patches", "failures", *SCHEMAS])
def test_conditions_on_every_column(store: Path, name: str) -> None:
    counts = found(store / name)
    assert len(counts) >= 3
    wanted = expected(store / name)
    assert counts == {column: wanted[column] for column in counts}


def test_tables_of_an_older_dinoray_are_put_right(store: Path) -> None:
    """Such tables did not say which columns have statistics, and readers found nothing."""
    for name in ("images", "matches"):
        log = store / name / "_delta_log" / f"{0:020}.json"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            if "metaData" in line:
                line["metaData"]["configuration"] = {}
        log.write_text("\n".join(json.dumps(line) for line in lines))
    assert found(store / "images")["label"][0] == 0
    opened = Store.open(str(store), settings())
    version = opened.images.content_version
    opened.repair("20260102T000000Z-000000")
    assert found(store / "images")["label"] == (1, 1)
    assert opened.images.content_version == version, "no row changed"
    (store / "matches").rename(store / "m")
    (store / "pairs").rename(store / "p")
    (store / "matches").mkdir()
    (store / "matches" / "nearest").mkdir()
    (store / "m").rename(store / "matches" / "nearest" / "matches")
    (store / "p").rename(store / "matches" / "nearest" / "pairs")
    compact.run(settings(), store=str(store))
    assert found(store / "matches" / "nearest" / "matches")["rank"] == (1, 1)
