"""Manifests: a table with a `uri` column, and optionally `id` and `label`, says which images there are."""

from __future__ import annotations

import json
import os
import posixpath
import stat
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.csv

from pipelines.errors import InputError
from pipelines.sources.listing import Rows
from pipelines.storage.errors import failed_storage, said
from pipelines.storage.filesystems import is_local, local_path, local_uri, open_filesystem, version_of
from pipelines.storage.secrets import without_credentials

# From here on, one listing of the folder is cheaper than asking for each object.
MIN_URIS_TO_LIST_FOLDER = 32
REQUESTS_AT_ONCE = 32

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_COLUMNS = ("uri", "id", "label")


def is_manifest_name(name: str) -> bool:
    name = name.lower()
    return name.removesuffix(".gz").endswith(_SUFFIXES)


def read_text_manifest(fs: Any, path: str, asked: str) -> pa.Table:
    """A CSV, TSV or JSON-lines manifest. Raises InputError with the line where it cannot be parsed."""
    import fsspec.core

    name = path.lower().removesuffix(".gz")
    try:
        with fsspec.core.OpenFile(
            fs, path, mode="rb", compression="gzip" if path.lower().endswith(".gz") else None
        ) as file:
            if name.endswith((".jsonl", ".ndjson")):
                return _read_json_lines(file)
            return pyarrow.csv.read_csv(
                file,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if name.endswith(".tsv") else ",", newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(_COLUMNS, pa.string()), strings_can_be_null=True, null_values=[""]
                ),
            )
    # Arrow's and Unicode's errors are ValueErrors.
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"The manifest {asked} cannot be read: {said(error)}.") from None


def _read_json_lines(file: Any) -> pa.Table:
    """The columns of a manifest as text, whatever else the lines hold.

    Arrow's own reader turns ids that look like dates into dates, and refuses ids that are numbers in some lines only.
    """
    columns: dict[str, list[str | None]] = {name: [] for name in _COLUMNS}
    named: set[str] = set()
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        named.update(row)
        for name, values in columns.items():
            value = row.get(name)
            if isinstance(value, dict | list):
                raise ValueError(f"line {number} has a {type(value).__name__} as {name} instead of text or a number")
            text = value if isinstance(value, str) or value is None else json.dumps(value)
            values.append(text and text.encode(errors="backslashreplace").decode())
    others = sorted(named - columns.keys())
    found = {name: values for name, values in columns.items() if name in named}
    length = len(columns["uri"])
    return pa.table({**found, **dict.fromkeys(others, pa.nulls(length))} if named else columns)


def list_manifest(table: pa.Table, folder: str, asked: str, storage_options: dict[str, Any] | None) -> Rows:
    """Rows of a manifest table; relative uris are relative to `folder`, where the manifest lies.

    A file that is not there is listed too, with an error: it becomes a failure and is not silently missed.
    """
    if "uri" not in table.column_names:
        raise InputError(
            f"The manifest {asked} has no `uri` column (it has {', '.join(table.column_names)}): name the column with "
            "the images' paths or URIs `uri`."
        )
    uris = _strings(table, "uri", asked)
    assert uris is not None
    empty = [number for number, uri in enumerate(uris) if not uri]
    if empty:
        raise InputError(f"The manifest {asked} has no uri in row {empty[0] + 1}: fill it in, or remove the row.")
    ids = _strings(table, "id", asked) or [without_credentials(str(uri)) for uri in uris]
    missing = [number for number, image_id in enumerate(ids) if not image_id]
    if missing:
        raise InputError(f"The manifest {asked} has no id in row {missing[0] + 1}: fill it in, or remove the column.")
    labels = _strings(table, "label", asked) or [None] * len(uris)
    places = [_resolve(str(uri), folder) for uri in uris]
    rows = Rows()
    facts = _facts(places, storage_options)
    for image_id, place, label in zip(ids, places, labels, strict=True):
        size, version, error = facts[place]
        rows.add(str(image_id), place, label, size, version, error=error)
    return rows


def _strings(table: pa.Table, name: str, asked: str) -> list[str | None] | None:
    if name not in table.column_names:
        return None
    if table.column_names.count(name) > 1:
        raise InputError(f"The manifest {asked} has several columns named `{name}`: keep one of them.")
    try:
        return table[name].cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise InputError(
            f"The manifest {asked} has a column `{name}` that is not text ({table[name].type}: "
            f"{said(error)}): give text or numbers."
        ) from None


def _resolve(uri: str, folder: str) -> str:
    if "://" in uri:
        return uri
    if is_local(folder) or uri.startswith(("/", "~")):
        return local_uri(os.path.normpath(os.path.join(local_path(folder), os.path.expanduser(uri))))
    protocol, _, path = f"{folder.rstrip('/')}/{uri}".partition("://")
    # Only where it must be: keys may have empty parts, which would be lost.
    if {".", ".."} & set(path.split("/")):
        path = posixpath.normpath(path)
    return f"{protocol}://{path}"


def _facts(uris: list[str], storage_options: dict[str, Any] | None) -> dict[str, tuple[int, str, str | None]]:
    """(size, version, error) of each file."""
    found: dict[str, tuple[int, str, str | None]] = {}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for uri in dict.fromkeys(uris):
        if is_local(uri):
            found[uri] = _local_facts(uri)
        else:
            by_folder[uri.rpartition("/")[0]].append(uri)
    single = [uri for members in by_folder.values() if len(members) < MIN_URIS_TO_LIST_FOLDER for uri in members]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        found.update(zip(single, pool.map(lambda uri: _remote_facts(uri, storage_options), single), strict=True))
        folders = [folder for folder, members in by_folder.items() if len(members) >= MIN_URIS_TO_LIST_FOLDER]
        for folder, listed in zip(folders, pool.map(lambda f: _listed(f, storage_options), folders), strict=True):
            for uri in by_folder[folder]:
                info = listed.get(uri.rpartition("/")[2])
                missing = (-1, "", f"{uri} does not exist")
                found[uri] = (int(info.get("size") or 0), version_of(info), None) if info else missing
    return found


def _local_facts(uri: str) -> tuple[int, str, str | None]:
    try:
        status = os.stat(local_path(uri))
    except OSError as error:
        return -1, "", f"{uri}: {error.strerror}"
    except ValueError as error:
        return -1, "", f"{uri!r} cannot be the name of a file: {error}"
    if not stat.S_ISREG(status.st_mode):
        return -1, "", f"{uri} is not a file"  # reading a pipe would wait forever
    return status.st_size, str(status.st_mtime_ns), None


def _remote_facts(uri: str, storage_options: dict[str, Any] | None) -> tuple[int, str, str | None]:
    fs, path = open_filesystem(uri, storage_options)
    try:
        info = fs.info(path)
        return int(info.get("size") or 0), version_of(info), None
    except OSError as error:
        if failed_storage(error):
            raise
        return -1, "", f"{uri}: {error}"


def _listed(folder: str, storage_options: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    fs, path = open_filesystem(folder, storage_options)
    try:
        return {info["name"].rstrip("/").rpartition("/")[2]: info for info in fs.ls(path, detail=True)}
    except FileNotFoundError:
        return {}
