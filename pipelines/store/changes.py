"""What a transaction says: files that come to tables and go from them, pointers that move, leftovers that are swept."""

from __future__ import annotations

import datetime as dt
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from deltalake import Schema

from pipelines.errors import JobError, RequestError
from pipelines.store.damage import DamagedLog, damaged
from pipelines.store.parquet import DataFile

# A transaction's file with a higher format is a newer dinoray's.
FORMAT = 1
# Of the other entries, in a transaction's file; none in those from before there were any.
CHECKSUM = "checksum"


@dataclass(frozen=True)
class TableChange:
    """Files that come to a table and files that go, in one commit.

    table: its path in the store, such as `patches` or `parts/animals/images`. schema: of its rows; files are in the
    order of its first column. rearranges: the files that come hold the rows of those that go. checksums: of files that
    come, by path, where they are known.
    """

    table: str
    schema: pa.Schema
    add: Sequence[DataFile] = ()
    remove: Sequence[str] = ()
    rearranges: bool = False
    checksums: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pointer:
    """What a result that is not a table is at present. All paths are relative to the store.

    file: an index's manifest, the model of a clustering. files: others that it needs, such as an index's segments.
    """

    file: str
    checksum: str | None = None
    files: tuple[str, ...] = ()

    @property
    def every_file(self) -> tuple[str, ...]:
        return (self.file, *self.files)


@dataclass(frozen=True)
class Change:
    """What a `build` asks for. Without anything in it, it is written all the same.

    tables: published in this order; the one whose rows say what is done comes last, so that those who read tables
    without a snapshot find what it names. pointers: those that move; None removes one. sweep: files that nobody names
    (pipelines.store.garbage), by their paths in the store.
    """

    tables: Sequence[TableChange] = ()
    pointers: Mapping[str, Pointer | None] = field(default_factory=dict)
    sweep: Sequence[str] = ()


@dataclass(frozen=True)
class TableEntry:
    """A TableChange as a transaction says it. schema: Delta's JSON, only of a table that was not there."""

    table: str
    key: str
    schema: str | None
    add: tuple[DataFile, ...]
    remove: tuple[str, ...]
    rearranges: bool
    checksums: dict[str, str]


@dataclass(frozen=True)
class Transaction:
    """A file of the log.

    token: of this attempt alone, so that its writer knows it again. previous: the token of the transaction before,
    from which a writer learns whether others went on from its own. created_at: by its writer's clock, UTC; nothing is
    decided by it. pointers: all that are in force, so that one file says what the results of a store are. changed: by
    table the last transaction that changed it, 0 for one that was only made.
    """

    number: int
    token: str
    previous: str
    run_id: str
    command: str
    created_at: str
    tables: tuple[TableEntry, ...] = ()
    pointers: dict[str, Pointer] = field(default_factory=dict)
    sweep: tuple[str, ...] = ()
    changed: dict[str, int] = field(default_factory=dict)

    @property
    def planned_at(self) -> int:
        return self.number - 1

    @property
    def created_ms(self) -> int:
        return int(dt.datetime.fromisoformat(self.created_at).timestamp() * 1000)

    def to_json(self) -> bytes:
        tables = [
            {
                "table": entry.table,
                "key": entry.key,
                **({"schema": entry.schema} if entry.schema else {}),
                "add": [_file(file, entry.checksums.get(file.path)) for file in entry.add],
                "remove": list(entry.remove),
                "rearranges": entry.rearranges,
            }
            for entry in self.tables
        ]
        pointers = {
            name: {"file": one.file, "checksum": one.checksum, "files": list(one.files)}
            for name, one in sorted(self.pointers.items())
        }
        content = {
            "format": FORMAT,
            "number": self.number,
            "planned_at": self.planned_at,
            "token": self.token,
            "previous": self.previous,
            "run_id": self.run_id,
            "command": self.command,
            "created_at": self.created_at,
            "tables": tables,
            "pointers": pointers,
            "sweep": list(self.sweep),
            "changed": dict(sorted(self.changed.items())),
        }
        return json.dumps(content | {CHECKSUM: _checksum(content)}, ensure_ascii=False, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> Transaction:
        """Raises JobError for a damaged file, RequestError for one of a newer dinoray."""
        try:
            content = json.loads(data)
            if content["format"] > FORMAT:
                raise RequestError(
                    f"{uri} was written by a newer dinoray (format {content['format']}, this one knows {FORMAT}): "
                    "update dinoray."
                )
            if content.pop(CHECKSUM, None) not in (None, _checksum(content)):
                raise ValueError("it has another checksum")
            return cls(
                content["number"],
                content["token"],
                content["previous"],
                content["run_id"],
                content["command"],
                content["created_at"],
                tuple(_table_entry(one) for one in content["tables"]),
                {name: _pointer(one) for name, one in content["pointers"].items()},
                tuple(checked_path(path) for path in content["sweep"]),
                {str(path): int(number) for path, number in content.get("changed", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RequestError):
                raise
            raise DamagedLog(damaged(uri, str(error))) from None


def table_entry(change: TableChange, *, exists: bool) -> TableEntry:
    """A change as its transaction says it. exists: the table does, so that its log has the schema."""
    schema = None if exists else Schema.from_arrow(change.schema).to_json()
    return TableEntry(
        checked_path(change.table),
        change.schema.names[0],
        schema,
        tuple(change.add),
        tuple(change.remove),
        change.rearranges,
        dict(change.checksums),
    )


def checked_path(path: str) -> str:
    """The path itself. Raises JobError for one that leads out of its folder: a stranger's store may hold such."""
    parts = path.split("/")
    if not path or "://" in path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise JobError(f"A transaction names {path!r}, which lies outside the store: the store is not to be trusted.")
    return path


def _checksum(content: Mapping[str, Any]) -> str:
    return f"crc32:{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _file(file: DataFile, checksum: str | None) -> dict[str, Any]:
    said = {"path": file.path, "size": file.size, "rows": file.rows, "min": file.min_id, "max": file.max_id}
    return said | ({"checksum": checksum} if checksum else {})


def _table_entry(content: dict[str, Any]) -> TableEntry:
    add = tuple(
        DataFile(checked_path(one["path"]), one["size"], one["rows"], one["min"], one["max"]) for one in content["add"]
    )
    return TableEntry(
        checked_path(content["table"]),
        content["key"],
        content.get("schema"),
        add,
        tuple(checked_path(path) for path in content["remove"]),
        content["rearranges"],
        {one["path"]: one["checksum"] for one in content["add"] if one.get("checksum")},
    )


def _pointer(content: dict[str, Any]) -> Pointer:
    files = tuple(checked_path(path) for path in content["files"])
    return Pointer(checked_path(content["file"]), content["checksum"], files)
