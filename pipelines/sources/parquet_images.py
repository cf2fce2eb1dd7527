"""Parquet datasets that carry the images' bytes: a binary column, or Hugging Face's struct of bytes and path."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.sources.listing import BrokenContainer, Rows
from pipelines.sources.walk import FileEntry
from pipelines.storage.errors import failed_storage, said
from pipelines.storage.filesystems import open_filesystem

_USUAL_NAMES = ("image", "img", "bytes", "image_bytes", "data", "content", "jpg", "jpeg", "png", "webp")
_ID_NAMES = ("id", "image_id", "key", "__key__")
_LABEL_NAMES = ("label", "cls", "class")


def image_column(schema: pa.Schema) -> str | None:
    """The column with the images, or None. Raises InputError when several could be meant."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if len(found) > 1:
        found = [name for name in _USUAL_NAMES if name in found][:1] or found
    if len(found) > 1:
        raise InputError(
            f"The Parquet dataset has several binary columns ({', '.join(found)}): name the one with images `image`."
        )
    return found[0] if found else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def list_parquet(fs: Any, entries: Sequence[FileEntry], asked: str) -> Rows:
    """Rows of every file. Ids: the id column; else the struct's paths where they are unique; else FILE/ROW."""
    rows = Rows()
    found: list[tuple[FileEntry, str | None, str | None, str | None, int, int]] = []
    number: dict[str, int] = {}
    for entry in entries:
        try:
            with fs.open(entry.path, "rb") as file:
                parquet = pq.ParquetFile(file)
                column = image_column(parquet.schema_arrow)
                if column is None:
                    raise InputError(
                        f"{entry.uri} has neither a `uri` column nor one with image bytes (it has "
                        f"{', '.join(parquet.schema_arrow.names)}): give a manifest with `uri`, or images as binary."
                    )
                for group in range(parquet.num_row_groups):
                    found += [(entry, *row) for row in _rows_of(parquet, group, column)]
        except (pa.ArrowException, OSError) as error:
            if failed_storage(error):
                raise
            rows.broken.append(broken_container(entry, error))
    paths = [path for _, _, path, _, _, _ in found]
    use_paths = None not in paths and len(set(paths)) == len(paths)
    for entry, given, path, label, group, row in found:
        position = number.get(entry.key, 0)
        number[entry.key] = position + 1
        image_id = given or (path if use_paths else None) or f"{entry.key}/{position:08d}"
        place = {"container": entry.uri, "row_group": group, "row": row}
        rows.add(image_id, f"{entry.uri}#{position}", label, entry.size, entry.version, **place)
    return rows


def broken_container(entry: FileEntry, error: Exception) -> BrokenContainer:
    """A Parquet file that cannot be read, as its reader said it."""
    return BrokenContainer(entry.uri, entry.key, entry.version, type(error).__name__, said(error))


def _rows_of(
    parquet: pq.ParquetFile, group: int, column: str
) -> list[tuple[str | None, str | None, str | None, int, int]]:
    """(id, path, label, row group, row) of a row group, read without the images' bytes."""
    schema = parquet.schema_arrow
    names = {
        kind: next((n for n in wanted if n in schema.names and n != column), None)
        for kind, wanted in (("id", _ID_NAMES), ("label", _LABEL_NAMES))
    }
    has_path = pa.types.is_struct(schema.field(column).type) and schema.field(column).type.get_field_index("path") >= 0
    wanted = [name for name in names.values() if name] + ([f"{column}.path"] if has_path else [])
    count = parquet.metadata.row_group(group).num_rows
    table = parquet.read_row_group(group, columns=wanted) if wanted else None

    def values(name: str | None) -> list[str | None]:
        if table is None or name is None:
            return [None] * count
        return table[name].cast(pa.string()).to_pylist()

    paths = [entry and entry["path"] for entry in table[column].to_pylist()] if table and has_path else [None] * count
    return [
        (given, path, label, group, row)
        for row, (given, path, label) in enumerate(zip(values(names["id"]), paths, values(names["label"]), strict=True))
    ]


class RowGroupCache:
    """The image column of the row group read last: neighbouring chunks of a shard lie in the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, str, int, int] | None = None
        self._column: Any = None

    def read(self, container: str, version: str, size: int, group: int, storage_options: dict[str, Any] | None) -> Any:
        """The column of a row group of the file that was listed with this version and size in bytes.

        Raises OSError when the file is another one by now.
        """
        key = (container, version, size, group)
        with self._lock:
            if self._key != key:
                fs, path = open_filesystem(container, storage_options)
                with fs.open(path, "rb") as file:
                    found = file.seek(0, 2)
                    if found != size:
                        raise OSError(f"{container} changed: {size} bytes when listed, {found} when read")
                    footer = pq.read_metadata(file)
                    schema = footer.schema.to_arrow_schema()
                    name = image_column(schema)
                    # as it is stored: one image repeated a million times takes the place of one
                    leaf = f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name
                    parquet = pq.ParquetFile(file, metadata=footer, read_dictionary=[leaf])
                    self._column = parquet.read_row_group(group, columns=[name])[name]
                self._key = key
            return self._column


ROW_GROUPS = RowGroupCache()


def image_bytes(column: Any, row: int) -> bytes | None:
    value = column[row].as_py()
    return value["bytes"] if isinstance(value, dict) else value
