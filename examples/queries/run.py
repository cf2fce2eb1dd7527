"""The ten questions of this folder put to a store, in the engine of your choice.

    python examples/queries/run.py demo/store
    python examples/queries/run.py s3://bucket/features --engine polars --clusters words --parts parts --matches nearest

A question whose tables the store does not have is passed over. The views that the questions name are

    images, patches, failures                 of the store itself
    assignments, centroids                    of clusters/NAME
    parts, part_patches                       of parts/NAME (its images and its patches)
    pairs, matches                            of matches/NAME
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

QUESTIONS = Path(__file__).parent
# Names of views, and the URIs of their Delta tables.
Tables = dict[str, str]
Ask = Callable[[str], pa.Table]


def tables_of(store: str, clusters: str, parts: str, matches: str) -> Tables:
    """The tables that are there."""
    places = {
        **{name: name for name in ("images", "patches", "failures")},
        **{name: f"clusters/{clusters}/{name}" for name in ("assignments", "centroids")},
        "parts": f"parts/{parts}/images",
        "part_patches": f"parts/{parts}/patches",
        **{name: f"matches/{matches}/{name}" for name in ("pairs", "matches")},
    }
    found = {view: f"{store.rstrip('/')}/{place}" for view, place in places.items()}
    return {view: uri for view, uri in found.items() if DeltaTable.is_deltatable(uri)}


def questions(engine: str, tables: Tables) -> Iterator[tuple[str, str]]:
    """(name, SQL) of every question that these tables answer: the engine's own wording, or the common one."""
    views = {"images", "patches", "failures", "assignments", "centroids", "parts", "part_patches", "pairs", "matches"}
    for file in sorted(QUESTIONS.glob("*.sql")):
        name, _, own = file.name.removesuffix(".sql").partition(".")
        sql = file.read_text()
        words = set(sql.replace("\n", " ").split(" "))
        if own in ("", engine) and words & views <= tables.keys():
            yield name, sql


def with_duckdb(tables: Tables) -> Ask:
    import duckdb

    connection = duckdb.connect()
    for view, uri in tables.items():
        connection.register(view, DeltaTable(uri).to_pyarrow_dataset())
    return lambda sql: connection.sql(sql).to_arrow_table()


def with_polars(tables: Tables) -> Ask:
    import polars as pl

    context = pl.SQLContext({view: pl.scan_delta(uri) for view, uri in tables.items()})
    embeddings = pl.scan_delta(tables["images"]).select("image_id", number="embedding")
    with_places = embeddings.with_columns(place=pl.int_ranges(pl.col("number").list.len()))
    context.register("embedding_numbers", with_places.explode("number", "place"))
    return lambda sql: context.execute(sql, eager=True).to_arrow()


def with_spark(tables: Tables) -> Ask:
    """Through the files that the log names, so that no Delta package is needed; a cluster has `format("delta")`."""
    from pyspark.sql import SparkSession

    spark: Any = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    for view, uri in tables.items():
        files = DeltaTable(uri).file_uris()
        if files:
            spark.read.parquet(*files).createOrReplaceTempView(view)
        else:
            spark.createDataFrame(DeltaTable(uri).to_pandas()).createOrReplaceTempView(view)
    return lambda sql: spark.sql(sql).toArrow()


ENGINES: dict[str, Callable[[Tables], Ask]] = {"duckdb": with_duckdb, "polars": with_polars, "spark": with_spark}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--engine", choices=list(ENGINES), default="duckdb")
    parser.add_argument("--clusters", default="words", help="NAME given to `dinoray cluster`")
    parser.add_argument("--parts", default="parts", help="NAME given to `dinoray cosegment`")
    parser.add_argument("--matches", default="nearest", help="NAME given to `dinoray correspond`")
    asked = parser.parse_args()
    tables = tables_of(asked.store, asked.clusters, asked.parts, asked.matches)
    if "images" not in tables:
        parser.error(f"there is no store at {asked.store}")
    ask = ENGINES[asked.engine](tables)
    for name, sql in questions(asked.engine, tables):
        print(f"\n{name}\n{sql.splitlines()[0]}\n{ask(sql).to_pandas().to_string(index=False)}")


if __name__ == "__main__":
    main()
