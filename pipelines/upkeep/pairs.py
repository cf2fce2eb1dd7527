"""Two tables that belong together, of which the leading one names, row by row, the files of the other: which rows of
both go where files of them are damaged, or rows of one have no partner in the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.results.linked_results import LinkedResult
from pipelines.store.changes import TableChange
from pipelines.store.parquet import DataFile
from pipelines.store.rewriting import rewrite
from pipelines.store.schemas import IMAGES
from pipelines.store.snapshots import Snapshot
from pipelines.store.store import Store
from pipelines.store.table import Table
from pipelines.store.written_files import WrittenFiles


@dataclass
class Damage:
    """What is known to be wrong with some tables, by their paths in the store.

    files: whose rows are lost. restored: files that the log lost. keys: of rows that are to be made again.
    """

    files: dict[str, set[str]] = field(default_factory=dict)
    restored: dict[str, dict[str, DataFile]] = field(default_factory=dict)
    keys: dict[str, set[str]] = field(default_factory=dict)

    def sound_files(self, current: Snapshot, table: str) -> dict[str, DataFile]:
        """The files of a table without those that are damaged, and with those that its log lost."""
        damaged = self.files.get(table, set())
        kept = {path: file for path, file in current.files(table).items() if path not in damaged}
        return kept | self.restored.get(table, {})


@dataclass(frozen=True)
class Pair:
    """data, leading: paths of the tables in their store. schemas: of both. key_columns: of a row, in both; keys_of
    joins them into one string."""

    data: str
    leading: str
    schemas: Mapping[str, pa.Schema]
    key_columns: Sequence[str]
    keys_of: Callable[[pa.Table], pa.Array]

    @classmethod
    def of_extraction(cls, store: Store) -> Pair:
        schemas = {"patches": store.patches.schema, "images": IMAGES}
        return cls("patches", "images", schemas, ["image_id"], lambda rows: rows["image_id"].combine_chunks())

    @classmethod
    def of_result(cls, result: LinkedResult) -> Pair:
        schemas = {result.path_of(table): schema for table, schema in result.schemas.items()}
        return cls(
            result.path_of(result.data), result.path_of(result.leading), schemas, result.key_columns, result.keys_of
        )


class PairMender:
    """Changes to a pair of tables that leave every row of one with its partner in the other.

    The leading table decides which rows are there; one whose data is lost goes, to be made again.
    """

    def __init__(self, pair: Pair, damage: Damage, written: WrittenFiles, run_id: str) -> None:
        self._pair = pair
        self._damage = damage
        self._written = written
        self._run_id = run_id
        self._keys: dict[tuple[str, str], list[str]] = {}
        self._rows: dict[str, list[tuple[str, str | None]]] = {}

    def changes(self, current: Snapshot) -> list[TableChange]:
        """What changes, as a snapshot has the tables; the leading one last."""
        pair = self._pair
        opened = {path: current.table(path, schema) for path, schema in pair.schemas.items()}
        data, leading = opened[pair.data], opened[pair.leading]
        assert data is not None and leading is not None
        of_data, of_leading = (self._damage.sound_files(current, path) for path in (pair.data, pair.leading))
        held = {path: set(self._keys_in(data, path)) for path in of_data}
        kept, gone = self._judge(leading, of_leading, held)
        renamed: dict[str, str | None] = {}
        for path in list(of_data):
            if (staying := held[path] & kept.get(path, set())) != held[path]:
                copy = self._without(data, of_data.pop(path), held[path] - staying)
                renamed[path] = copy.path if copy else None
                of_data |= {copy.path: copy} if copy else {}
        for path in list(of_leading):
            if gone[path] or any(shard in renamed for _, shard in self._rows[path]):
                copy = self._renamed(leading, of_leading.pop(path), gone[path], renamed)
                of_leading |= {copy.path: copy} if copy else {}
        files = {pair.data: of_data, pair.leading: of_leading}
        return [
            change for path in (pair.data, pair.leading) if (change := difference(current, opened[path], path, files))
        ]

    def _judge(
        self, leading: Table, files: Mapping[str, DataFile], held: Mapping[str, set[str]]
    ) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """(keys that stay by file of data, keys that go by file of the leading table)."""
        unwanted = set[str]().union(*(self._damage.keys.get(path, set()) for path in self._pair.schemas))
        kept: dict[str, set[str]] = {}
        gone: dict[str, set[str]] = {}
        for path in files:
            gone[path] = set()
            for key, shard in self._rows_in(leading, path):
                if key in unwanted or (shard is not None and key not in held.get(shard, ())):
                    gone[path].add(key)
                elif shard is not None:
                    kept.setdefault(shard, set()).add(key)
        return kept, gone

    def _keys_in(self, table: Table, path: str) -> list[str]:
        if (table.uri, path) not in self._keys:
            rows = table.read_file(path, list(self._pair.key_columns))
            self._keys[table.uri, path] = pc.unique(self._pair.keys_of(rows)).to_pylist()
        return self._keys[table.uri, path]

    def _rows_in(self, leading: Table, path: str) -> list[tuple[str, str | None]]:
        """(key, file of data) of each row of a file of the leading table."""
        if path not in self._rows:
            rows = leading.read_file(path, [*self._pair.key_columns, "shard"])
            self._rows[path] = list(zip(self._pair.keys_of(rows).to_pylist(), rows["shard"].to_pylist(), strict=True))
        return self._rows[path]

    def _without(self, table: Table, file: DataFile, gone: set[str]) -> DataFile | None:
        return self._renamed(table, file, gone, {})

    def _renamed(
        self, table: Table, file: DataFile, gone: set[str], renamed: Mapping[str, str | None]
    ) -> DataFile | None:
        """A copy of a file without some keys, in which files of data have their new names; None for an empty one."""
        value_set = pa.array(sorted(gone), pa.string())

        def change(rows: pa.Table) -> pa.Table:
            rows = rows.filter(pc.invert(pc.is_in(self._pair.keys_of(rows), value_set=value_set)))
            if not renamed:
                return rows
            shards = [renamed.get(shard, shard) for shard in rows["shard"].to_pylist()]
            return rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array(shards, pa.string()))

        what = (file.path, frozenset(gone), frozenset(renamed.items()))
        return self._written.once(table, what, lambda: rewrite(table, file, self._run_id, change))


def difference(
    current: Snapshot, table: Table | None, path: str, files: Mapping[str, Mapping[str, DataFile]]
) -> TableChange | None:
    """The change that leaves a table with these files; None where it has them. files: by the paths of tables."""
    here, wanted = current.files(path), files[path]
    add = [file for name, file in wanted.items() if name not in here]
    remove = [name for name in here if name not in wanted]
    assert table is not None
    return TableChange(path, table.schema, add, remove) if add or remove else None
