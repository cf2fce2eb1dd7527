"""Files in which a user lists images by their ids: pairs of them, or sets. CSV, JSON lines or Parquet, read as text."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import RequestError, counted
from pipelines.storage.errors import said

ENDINGS = (".csv", ".jsonl", ".ndjson", ".parquet")
MAX_NAMES_SHOWN = 3


@dataclass(frozen=True)
class IdFile:
    """What a file should hold.

    kind: what messages call it, such as "pairs". setting: the setting or option that names the file. forms: the values
    that this setting may have, in words. columns: name -> what its values are, such as "an image_id".
    """

    kind: str
    setting: str
    forms: str
    columns: dict[str, str]


def is_id_file(name: str) -> bool:
    """Whether a name has the ending of such a file."""
    return name.lower().endswith(ENDINGS)


def read_id_file(uri: str, asked: IdFile, options: storage.Options) -> list[pa.ChunkedArray]:
    """The columns asked for, as text without nulls.

    Raises RequestError for a name of another kind, and a file that is not there, cannot be read, or lacks a column or
    a value.
    """
    if not is_id_file(uri):
        raise RequestError(f"{asked.setting} is {uri}, but it must be {asked.forms}.")
    table = _read(uri, asked, options)
    for name in asked.columns:
        if (times := table.column_names.count(name)) != 1:
            raise RequestError(
                f"The {asked.kind} file {uri} has {'no column' if not times else 'several columns'} {name} (it has "
                f"{', '.join(table.column_names) or 'none'}): name the columns {' and '.join(asked.columns)}."
            )
    columns = {name: table[name].cast(pa.string()) for name in asked.columns}
    for value in dict.fromkeys(asked.columns.values()):
        missing = sum(column.null_count for name, column in columns.items() if asked.columns[name] == value)
        if missing:
            empty = counted(missing, "empty value")
            raise RequestError(f"The {asked.kind} file {uri} has {empty} where {value} should be.")
    return list(columns.values())


def names_shown(names: Sequence[str]) -> str:
    """The first names; one that would be misread (empty, spaces around it, line breaks) in quotes."""
    more = len(names) - MAX_NAMES_SHOWN
    shown = [
        name if name and name.isprintable() and name == name.strip() else repr(name) for name in names[:MAX_NAMES_SHOWN]
    ]
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def _read(uri: str, asked: IdFile, options: storage.Options) -> pa.Table:
    name, columns = uri.lower(), list(asked.columns)
    fs, path = storage.filesystem(storage.normalise(uri), options)
    try:
        with storage.reaching(uri), fs.open(path, "rb") as file:
            if name.endswith(".parquet"):
                return _parquet(file, columns)
            return _csv(file, columns) if name.endswith(".csv") else _json_lines(file, asked.columns)
    except FileNotFoundError:
        raise RequestError(
            f"The {asked.kind} file {uri} does not exist: {asked.setting} must be {asked.forms}."
        ) from None
    # Arrow's and Unicode's errors are ValueErrors.
    except (OSError, ValueError, csv.Error) as error:
        raise RequestError(f"The {asked.kind} file {uri} cannot be read: {said(error)}.") from None


def _parquet(file: Any, columns: list[str]) -> pa.Table:
    """The columns; all there are, without rows, when one is missing."""
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if sorted(name for name in names if name in columns) == sorted(columns):
            return parquet.read(columns)
        return parquet.schema_arrow.empty_table()


def _csv(file: Any, columns: list[str]) -> pa.Table:
    """The columns as text; an id may hold anything that is quoted, a line break too."""
    header = next(csv.reader([file.readline().decode("utf-8-sig")]), [])
    if sorted(name for name in header if name in columns) != sorted(columns):
        return pa.Table.from_arrays([pa.array([], pa.string()) for _ in header], names=header)
    file.seek(0)
    return pyarrow.csv.read_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), include_columns=columns
        ),
    )


def _json_lines(file: Iterable[bytes], columns: dict[str, str]) -> pa.Table:
    """The columns as text; Arrow's own reader turns ids that look like dates into dates."""
    found: dict[str, list[str]] = {name: [] for name in columns}
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        row: Any = json.loads(line)
        if not isinstance(row, dict) or not row.keys() >= found.keys():
            raise ValueError(f"line {number} is not an object with {' and '.join(columns)}")
        for name, values in found.items():
            if not isinstance(row[name], str | int):
                raise ValueError(
                    f"line {number} has {json.dumps(row[name])} for {name}, which should be {columns[name]}"
                )
            values.append(str(row[name]))
    return pa.table({name: pa.array(values, pa.string()) for name, values in found.items()})
