"""What kind of INPUT was given, and its listing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError, StorageError
from pipelines.sources.listing import Listing, Rows
from pipelines.sources.manifests import is_manifest_name, list_manifest, read_text_manifest
from pipelines.sources.names import ARCHIVES, as_text, extension, is_image_name
from pipelines.sources.parquet_images import broken_container, list_parquet
from pipelines.sources.tars import list_tars
from pipelines.sources.walk import (
    FileEntry,
    expand_braces,
    glob,
    glob_root,
    has_magic,
    local_file,
    remote_entry,
    walk_local,
    walk_remote,
)
from pipelines.storage.errors import failed_storage, said
from pipelines.storage.filesystems import is_local, local_path, open_filesystem


def list_images(
    input_uri: str, *, storage_options: dict[str, Any] | None = None, exclude: str | None = None
) -> Listing:
    """The images of an INPUT of any kind, sorted by image_id.

    Args:
        input_uri: folder, prefix, glob, file, tar, manifest or Parquet dataset; a path or any fsspec URI.
        storage_options: for fsspec.
        exclude: a path or URI below INPUT that is not listed: the store, when it lies there.

    Raises:
        InputError: INPUT is missing, empty, unreadable, of no known kind, or names an id twice.
        StorageError: the storage did not answer.
    """
    local = is_local(input_uri)
    uri = os.path.abspath(os.path.expanduser(local_path(input_uri))) if local else input_uri.rstrip("/")
    fs, path = open_filesystem(uri, storage_options)
    hidden = None if exclude is None or is_local(exclude) != local else _on_filesystem(fs, exclude, local)
    try:
        return _list(fs, path, input_uri, uri, local=local, exclude=hidden, storage_options=storage_options)
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"INPUT {input_uri} may not be read: check permissions or credentials ({error}).") from None
    except FileNotFoundError:
        raise InputError(f"INPUT {input_uri} does not exist: check the path.") from None
    except Exception as error:
        if failed_storage(error):
            raise StorageError(
                f"INPUT {input_uri} cannot be reached: {said(error)}. Check its endpoint and your credentials, or run "
                "the same command again."
            ) from None
        if isinstance(error, OSError):
            raise InputError(f"INPUT {input_uri} cannot be read: {said(error)}.") from None
        raise


def _on_filesystem(fs: Any, uri: str, local: bool) -> str:
    return os.path.abspath(local_path(uri)) if local else fs._strip_protocol(uri).rstrip("/")


def _list(
    fs: Any,
    path: str,
    asked: str,
    uri: str,
    *,
    local: bool,
    exclude: str | None,
    storage_options: dict[str, Any] | None,
) -> Listing:
    if os.path.isdir(path) if local else fs.isdir(path):
        walked = walk_local(path, exclude) if local else walk_remote(fs, path, exclude)
        return _list_files(fs, walked, asked, local=local, storage_options=storage_options)
    if os.path.isfile(path) if local else _is_object(fs, path):
        entry = local_file(path) if local else remote_entry(fs, path, path.rpartition("/")[0], fs.info(path))
        return _list_file(fs, entry, asked, uri, local=local, storage_options=storage_options)
    if (alternatives := expand_braces(path)) != [path]:
        named = _alternatives(fs, alternatives, asked, local=local, exclude=exclude)
        return _list_files(fs, named, asked, local=local, storage_options=storage_options)
    if has_magic(path):
        found = glob(fs, path, local=local, exclude=exclude)
        return _list_files(fs, found, asked, local=local, storage_options=storage_options)
    raise InputError(f"INPUT {asked} does not exist: give a folder, prefix, glob, .tar, manifest or Parquet dataset.")


def _is_object(fs: Any, path: str) -> bool:
    """fsspec's own answer is no whenever the storage fails."""
    try:
        return fs.info(path)["type"] == "file"
    except FileNotFoundError:
        return False


def _alternatives(fs: Any, paths: list[str], asked: str, *, local: bool, exclude: str | None) -> Iterator[FileEntry]:
    """Every file that one of `paths` (files, folders or globs) names, once; keys are relative to what they share."""
    root = os.path.commonpath([glob_root(path) for path in paths])
    seen: set[str] = set()
    for path in paths:
        found: Iterable[FileEntry]
        if os.path.isfile(path) if local else _is_object(fs, path):
            found = [local_file(path, root) if local else remote_entry(fs, path, root, fs.info(path))]
        elif os.path.isdir(path) if local else fs.isdir(path):
            found = walk_local(path, exclude, root=root) if local else walk_remote(fs, path, exclude, root=root)
        elif has_magic(path):
            found = glob(fs, path, local=local, exclude=exclude, root=root)
        else:
            raise InputError(
                f"INPUT {asked} names {as_text(path)}, which does not exist: check what is between the braces."
            )
        for entry in found:
            if entry.path not in seen:
                seen.add(entry.path)
                yield entry


def _list_file(
    fs: Any, entry: FileEntry, asked: str, uri: str, *, local: bool, storage_options: dict[str, Any] | None
) -> Listing:
    """INPUT is one file."""
    name = entry.name.lower()
    if name.endswith(ARCHIVES):
        raise InputError(
            f"INPUT {asked} is a compressed tar, whose members cannot be read one by one: unpack it to .tar."
        )
    if is_manifest_name(name):
        table = read_text_manifest(fs, entry.path, asked)
        rows = list_manifest(table, uri.rpartition("/")[0] or "/", asked, storage_options)
        return _not_empty(rows, "manifest", asked)
    if extension(name) not in (".parquet", ".tar", "") and not is_image_name(name):
        raise InputError(
            f"INPUT {asked} is neither an image by name nor a .tar, .parquet, .csv, .tsv or .jsonl file: give one of "
            "these, or a folder."
        )
    return _list_files(fs, [entry], asked, local=local, storage_options=storage_options)


def _list_files(
    fs: Any, entries: Iterable[FileEntry], asked: str, *, local: bool, storage_options: dict[str, Any] | None
) -> Listing:
    """INPUT is files: images, tars of images; or, where there are neither, Parquet files.

    Files without an extension are images where no file has an image's extension, as in buckets of objects named by
    their hash; beside files that have one they are something else.
    """
    rows, nameless = Rows(), Rows()
    tars: list[FileEntry] = []
    parquets: list[FileEntry] = []
    for entry in entries:
        ending = extension(entry.name)
        if ending == ".tar":
            tars.append(entry)
        elif ending == ".parquet":
            parquets.append(entry)
        elif is_image_name(entry.name) or not ending:
            folder = entry.key.rpartition("/")[0].rpartition("/")[2]
            (rows if ending else nameless).add(entry.key, entry.uri, folder or None, entry.size, entry.version)
        else:
            rows.skipped[ending] += 1
    if not len(rows) and not tars and not parquets:
        nameless.skipped = rows.skipped
        rows = nameless
    elif len(nameless):
        rows.skipped[""] += len(nameless)
    kind = "directory" if len(rows) else "tar" if tars else "parquet"
    if tars:
        rows.extend([list_tars(fs, tars, local=local)])
    if kind == "parquet" and parquets:
        return _list_parquets(fs, sorted(parquets), asked, storage_options)
    if parquets:
        rows.skipped[".parquet"] += len(parquets)
    return _not_empty(rows, kind, asked)


def _list_parquets(fs: Any, entries: list[FileEntry], asked: str, storage_options: dict[str, Any] | None) -> Listing:
    """Parquet files are a manifest when they have a `uri` column, and else must carry the images."""
    if "uri" not in _columns_of_first_readable(fs, entries):
        return _not_empty(list_parquet(fs, entries, asked), "parquet", asked)
    rows = Rows()
    for entry in entries:
        try:
            with fs.open(entry.path, "rb") as file:
                parquet = pq.ParquetFile(file)
                names = parquet.schema_arrow.names
                table = parquet.read([name for name in ("uri", "id", "label") if name in names] or names[:1])
        except (pa.ArrowException, OSError) as error:
            if failed_storage(error):
                raise
            rows.broken.append(broken_container(entry, error))
            continue
        rows.extend([list_manifest(table, entry.uri.rpartition("/")[0] or "/", asked, storage_options)])
    return _not_empty(rows, "manifest", asked)


def _columns_of_first_readable(fs: Any, entries: list[FileEntry]) -> list[str]:
    for entry in entries:
        with contextlib.suppress(pa.ArrowException, OSError), fs.open(entry.path, "rb") as file:
            return pq.read_schema(file).names
    return []  # list_parquet reports each damaged file


def _not_empty(rows: Rows, kind: str, asked: str) -> Listing:
    if len(rows) or rows.broken:
        return rows.finish(kind, asked)
    passed_over = ", ".join(f"{count} {ending or 'without extension'}" for ending, count in rows.skipped.most_common(5))
    found = f"are only files that are not images by name ({passed_over})" if passed_over else "is nothing in it"
    raise InputError(f"INPUT {asked} has no images: there {found}.")
