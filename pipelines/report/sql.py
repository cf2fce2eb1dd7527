"""`--query`: images chosen in SQL over a store's tables, by DuckDB.

A query may come from a pipeline file that somebody else wrote. It is one SELECT over the store's tables: it reads no
other file, writes none, reaches no network and sees nothing of this process.
"""

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
        files = [file for name, table in tables.items() for file in _add_view(connection, name, table)]
        _confine(connection, files)
        try:
            _refuse_other_statements(connection, query, list(tables))
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


def _add_view(connection: duckdb.DuckDBPyConnection, name: str, table: Table) -> list[str]:
    """Make the version of a table that is open known by a name. Returns its files, as the table's log names them."""
    files = [table.place(path) for path in table.files()]
    if files:
        connection.execute(f'CREATE VIEW "{name}" AS SELECT * FROM read_parquet([{_quoted(files)}])')
    else:
        connection.register(name, table.schema.empty_table())
    return files


def _confine(connection: duckdb.DuckDBPyConnection, files: list[str]) -> None:
    """Let a connection read these files, and nothing else, for good."""
    if files:
        connection.execute(f"SET allowed_paths = [{_quoted(files)}]")
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _refuse_other_statements(connection: duckdb.DuckDBPyConnection, query: str, tables: list[str]) -> None:
    """Raises RequestError for anything but one SELECT, and duckdb.Error for what is no SQL."""
    statements = connection.extract_statements(query)
    kinds = [statement.type.name for statement in statements]
    if kinds != ["SELECT"]:
        raise RequestError(
            f"--query is one SELECT, but {' and '.join(kinds) or 'nothing'} was given. The tables are "
            f"{', '.join(tables)}."
        )


def _quoted(files: list[str]) -> str:
    return ", ".join("'" + file.replace("'", "''") + "'" for file in files)
