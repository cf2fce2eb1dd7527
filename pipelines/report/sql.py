"""`--query`: images chosen in SQL over a store's tables, by DuckDB."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines import storage
from pipelines.errors import RequestError
from pipelines.results.all_kinds import all_results
from pipelines.storage.filesystems import is_local
from pipelines.store.store import Store
from pipelines.store.table import Table

if TYPE_CHECKING:
    import duckdb


MAX_QUERY_ROWS_READ = 1_000_000


def image_ids_of(store: Store, query: str) -> list[str]:
    """The column image_id of a query's first million rows, each once, in their order.

    Raises RequestError for a query that is wrong, has no such column or finds nothing, and without DuckDB.
    """
    try:
        import duckdb
    except ImportError:
        raise RequestError('--query needs DuckDB: pip install "dinoray[sql]", or choose with --images.') from None
    with duckdb.connect() as connection:
        tables = dict(_tables(store))
        if not is_local(store.uri):
            connection.register_filesystem(storage.filesystem(store.uri, store.config.storage.options)[0])
        for name, table in tables.items():
            _add_view(connection, name, table)
        try:
            found = connection.execute(query)
            columns = [about[0] for about in found.description or ()]
            rows = found.fetchmany(MAX_QUERY_ROWS_READ) if "image_id" in columns else []
        except duckdb.Error as error:
            said = " ".join(str(error).split())
            raise RequestError(f"--query cannot be run ({said}). The tables are {', '.join(tables)}.") from None
    if "image_id" not in columns:
        raise RequestError(
            f"--query gives {', '.join(columns) or 'no columns'}, but a column image_id says which images to show: "
            "such as SELECT image_id FROM images WHERE label = 'cat'."
        )
    at = columns.index("image_id")
    ids = list(dict.fromkeys(str(row[at]) for row in rows if row[at] is not None))
    if not ids:
        raise RequestError("--query finds no image.")
    return ids


def _tables(store: Store) -> Iterator[tuple[str, Table]]:
    """Every table of a store under the name that a query gives it: parts/animals/images is parts_animals_images."""
    yield from (("images", store.images), ("patches", store.patches), ("failures", store.failures))
    for result in all_results(store):
        for name, table in result.tables.items():
            yield _named(result.kind, result.name, name), table


def _named(*parts: str) -> str:
    return "_".join(re.sub(r"\W", "_", part) for part in parts)


def _add_view(connection: duckdb.DuckDBPyConnection, name: str, table: Table) -> None:
    """The files of the version that is open, as their table's log names them."""
    files = [storage.join(table.uri, path) for path in table.files()]
    if not files:
        empty = table.schema.empty_table()
        connection.register(name, empty)
        return
    quoted = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
    connection.execute(f'CREATE VIEW "{name}" AS SELECT * FROM read_parquet([{quoted}])')
