"""Manifests: a table with a `uri` column, and optionally `id` and `label`, says which images there are."""

from __future__ import annotations

import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from pipelines.sources.errors import InputError
from pipelines.sources.filesystems import is_local, local_path, open_filesystem, version_of
from pipelines.sources.listing import Rows

MANY_IN_A_FOLDER = 32  # from here on one listing of the folder is cheaper than asking for each object
REQUESTS_AT_ONCE = 32

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")


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
                return pyarrow.json.read_json(file)
            strings = dict.fromkeys(("uri", "id", "label"), pa.string())
            return pyarrow.csv.read_csv(
                file,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if name.endswith(".tsv") else ",", newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=strings, strings_can_be_null=True, null_values=[""]
                ),
            )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"The manifest {asked} cannot be read: {str(error).splitlines()[0]}.") from None


def list_manifest(table: pa.Table, folder: str, asked: str, storage_options: dict[str, Any] | None) -> Rows:
    """Rows of a manifest table; relative uris are relative to `folder`, where the manifest lies.

    A file that is not there is listed too, with an error: it becomes a failure and is not silently missed.
    """
    if "uri" not in table.column_names:
        raise InputError(
            f"The manifest {asked} has no `uri` column (it has {', '.join(table.column_names)}): name the column with "
            "the images' paths or URIs `uri`."
        )
    uris = _strings(table, "uri")
    assert uris is not None
    empty = [number for number, uri in enumerate(uris) if not uri]
    if empty:
        raise InputError(f"The manifest {asked} has no uri in row {empty[0] + 1}: fill it in, or remove the row.")
    ids = _strings(table, "id") or uris
    missing = [number for number, image_id in enumerate(ids) if not image_id]
    if missing:
        raise InputError(f"The manifest {asked} has no id in row {missing[0] + 1}: fill it in, or remove the column.")
    labels = _strings(table, "label") or [None] * len(uris)
    places = [_resolve(str(uri), folder) for uri in uris]
    rows = Rows()
    facts = _facts(places, storage_options)
    for image_id, place, label in zip(ids, places, labels, strict=True):
        size, version, error = facts[place]
        rows.add(str(image_id), place, label, size, version, error=error)
    return rows


def _strings(table: pa.Table, name: str) -> list[str | None] | None:
    return table[name].cast(pa.string()).to_pylist() if name in table.column_names else None


def _resolve(uri: str, folder: str) -> str:
    if "://" in uri:
        return uri
    if is_local(folder):
        return os.path.normpath(os.path.join(folder, os.path.expanduser(uri)))
    return f"{folder.rstrip('/')}/{uri}"


def _facts(uris: list[str], storage_options: dict[str, Any] | None) -> dict[str, tuple[int, str, str | None]]:
    """(size, version, error) of each file."""
    found: dict[str, tuple[int, str, str | None]] = {}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for uri in dict.fromkeys(uris):
        if is_local(uri):
            found[uri] = _local_facts(uri)
        else:
            by_folder[uri.rpartition("/")[0]].append(uri)
    single = [uri for members in by_folder.values() if len(members) < MANY_IN_A_FOLDER for uri in members]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        found.update(zip(single, pool.map(lambda uri: _remote_facts(uri, storage_options), single), strict=True))
        folders = [folder for folder, members in by_folder.items() if len(members) >= MANY_IN_A_FOLDER]
        for folder, listed in zip(folders, pool.map(lambda f: _listed(f, storage_options), folders), strict=True):
            for uri in by_folder[folder]:
                info = listed.get(uri.rpartition("/")[2])
                missing = (-1, "", f"{uri} does not exist")
                found[uri] = (int(info["size"] or 0), version_of(info), None) if info else missing
    return found


def _local_facts(uri: str) -> tuple[int, str, str | None]:
    try:
        status = os.stat(local_path(uri))
        return status.st_size, str(status.st_mtime_ns), None
    except OSError as error:
        return -1, "", f"{uri}: {error.strerror}"


def _remote_facts(uri: str, storage_options: dict[str, Any] | None) -> tuple[int, str, str | None]:
    fs, path = open_filesystem(uri, storage_options)
    try:
        info = fs.info(path)
        return int(info.get("size") or 0), version_of(info), None
    except OSError as error:
        return -1, "", f"{uri}: {error}"


def _listed(folder: str, storage_options: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    fs, path = open_filesystem(folder, storage_options)
    try:
        return {info["name"].rstrip("/").rpartition("/")[2]: info for info in fs.ls(path, detail=True)}
    except FileNotFoundError:
        return {}
