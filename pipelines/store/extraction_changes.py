"""A change to `patches`, `images` and `failures`, put together from what a snapshot holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.store.changes import Change, TableChange
from pipelines.store.parquet import DataFile
from pipelines.store.rewriting import rewrite, rewrite_without
from pipelines.store.snapshots import Snapshot
from pipelines.store.table import Table
from pipelines.store.written_files import WrittenFiles

if TYPE_CHECKING:
    from pipelines.store.store import Store

# The order is that of publishing: images name patches.
TABLES = ("patches", "images", "failures")


class ImageRow(NamedTuple):
    """A row of images: the file of images that holds it, and the file of patches that it names."""

    image_id: str
    file: str
    shard: str | None


@dataclass
class _Exchange:
    """Files of a table that come and go."""

    table: Table
    files: dict[str, DataFile]
    add: list[DataFile] = field(default_factory=list)
    remove: list[str] = field(default_factory=list)


class ExtractionChange:
    """What is added and removed, so far. Files are written while it is put together, each once (`WrittenFiles`)."""

    def __init__(self, store: Store, current: Snapshot, written: WrittenFiles, run_id: str) -> None:
        self._written = written
        self._run_id = run_id
        opened = {name: current.table(name, store.schemas[name]) or getattr(store, name) for name in TABLES}
        self._exchanges = {name: _Exchange(table, dict(current.files(name))) for name, table in opened.items()}

    def table(self, name: str) -> Table:
        """A table as the snapshot has it."""
        return self._exchanges[name].table

    def files(self, name: str) -> Mapping[str, DataFile]:
        """The files of a table as the snapshot has it."""
        return self._exchanges[name].files

    def add(self, name: str, *files: DataFile | None) -> None:
        """Have files come to a table; None stands for one that would be empty."""
        self._exchanges[name].add += [file for file in files if file]

    def remove(self, name: str, paths: Iterable[str]) -> None:
        """Have files go from a table, with all their rows."""
        self._exchanges[name].remove += paths

    def remove_images(self, rows: Collection[ImageRow]) -> None:
        """Have images go, and their patches: copies without them take the place of their files.

        Other images of a file of patches that is copied get its new name. To be called once.
        """
        renamed: dict[str, str | None] = {}
        patches = self._exchanges["patches"]
        for shard in sorted({row.shard for row in rows if row.shard in patches.files}):
            gone = {row.image_id for row in rows if row.shard == shard}
            copy = self._without("patches", patches.files[shard], gone)
            self._replace("patches", shard, copy)
            renamed[shard] = copy.path if copy else None
        for path, named in self._files_naming(rows, [patches.files[shard] for shard in renamed]).items():
            gone = {row.image_id for row in rows if row.file == path}
            new_names = {shard: renamed[shard] for shard in named}
            images = self._exchanges["images"]
            what = (path, frozenset(gone), frozenset(new_names.items()))
            self._replace("images", path, self._written.once(images.table, what, self._changed(path, gone, new_names)))

    def remove_failures(self, image_ids: Collection[str]) -> int:
        """Have failures of images go; how many rows there are."""
        failures, removed = self._exchanges["failures"], 0
        wanted, ordered = pa.array(image_ids, pa.string()), sorted(image_ids)
        for path, file in failures.files.items():
            if not file.may_hold(ordered):
                continue
            held = failures.table.read_file(path, ["image_id"])["image_id"]
            hit = held.filter(pc.is_in(held, value_set=wanted)).to_pylist()
            if hit:
                removed += len(hit)
                self._replace("failures", path, self._without("failures", file, set(hit)))
        return removed

    def as_change(self) -> Change | None:
        """What a `build` returns; None where nothing comes and nothing goes."""
        changes = [
            TableChange(name, one.table.schema, one.add, one.remove)
            for name, one in self._exchanges.items()
            if one.add or one.remove
        ]
        return Change(changes) if changes else None

    def _replace(self, name: str, path: str, copy: DataFile | None) -> None:
        self.remove(name, [path])
        self.add(name, copy)

    def _without(self, name: str, file: DataFile, gone: set[str]) -> DataFile | None:
        table = self._exchanges[name].table
        what = (file.path, frozenset(gone))
        return self._written.once(table, what, lambda: rewrite_without(table, file, gone, self._run_id))

    def _changed(self, path: str, gone: set[str], renamed: dict[str, str | None]) -> Callable[[], DataFile | None]:
        images = self._exchanges["images"]
        return lambda: rewrite(
            images.table, images.files[path], self._run_id, lambda rows: changed(rows, gone, renamed)
        )

    def _files_naming(self, rows: Collection[ImageRow], shards: list[DataFile]) -> dict[str, set[str]]:
        """Files of images that hold the rows or name one of the shards -> the shards that they name."""
        images = self._exchanges["images"]
        found: dict[str, set[str]] = {row.file: set() for row in rows}
        names = pa.array([shard.path for shard in shards], pa.string())
        for path, file in images.files.items():
            if any(shard.min_id <= file.max_id and file.min_id <= shard.max_id for shard in shards):
                named = images.table.read_file(path, ["shard"])["shard"]
                here = set(pc.unique(named.filter(pc.is_in(named, value_set=names))).to_pylist())
                if here:
                    found[path] = found.get(path, set()) | here
        return dict(sorted(found.items()))


def changed(rows: pa.Table, gone: Collection[str], renamed: Mapping[str, str | None]) -> pa.Table:
    """Rows of images without some images, their shards renamed."""
    rows = rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=pa.array(sorted(gone), pa.string()))))
    shards = [renamed.get(shard, shard) for shard in rows["shard"].to_pylist()]
    return rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array(shards, pa.string()))
