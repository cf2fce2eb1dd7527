"""What every kind of result in a store has: a name, tables, counts, a version, and checks.

Whatever looks at all results (verify, stats, compact, pipelines, queries of a report) does so through `StoredResult`,
so that a new kind is known to all of them once it is in pipelines/results/all_kinds.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import pyarrow as pa

from pipelines import storage
from pipelines.results.names import result_names, result_uri
from pipelines.store.damage import DamagedLog, run_repair
from pipelines.store.findings import Finding
from pipelines.store.linked_tables import LinkedTables
from pipelines.store.new_tables import make_tables
from pipelines.store.snapshots import snapshot
from pipelines.store.table import Table
from pipelines.store.transaction_log import TransactionLog


@dataclass
class Findings:
    """What a check found.

    problems: damage. notes: what is worth knowing and harmless. files: how many the result
    has that belong to no table. unreferenced_files: left by killed runs; harmless.
    """

    problems: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    unreferenced_files: int = 0


class StoredResult(ABC):
    """One result of a job, KIND/NAME in a store. tables: by name; empty for a result that consists of files."""

    kind: ClassVar[str]
    name: str
    tables: dict[str, Table]

    @property
    def path(self) -> str:
        """Where it lies below the store: clusters/words."""
        return f"{self.kind}/{self.name}"

    @abstractmethod
    def version(self) -> str:
        """Changes whenever its rows change, and not when its files are merged."""

    @abstractmethod
    def missing(self) -> str:
        """What of it is gone or cut short, in words; empty when all files are there. Reads none of them."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """What it holds, as stats shows it."""

    @abstractmethod
    def describe(self, counts: dict[str, int]) -> str:
        """Those counts in words."""

    @abstractmethod
    def linked_tables(self) -> Iterator[LinkedTables]:
        """Every table once, as data, with the table that names its files."""


class ResultTables(StoredResult):
    """A result that consists of Delta tables, at the versions last refreshed.

    leading: the table whose rows decide what is done. command: that changes the tables.
    """

    schemas: ClassVar[Mapping[str, pa.Schema]]
    leading: ClassVar[str]
    command: ClassVar[str]

    def __init__(
        self,
        store: str,
        name: str,
        options: storage.Options,
        log: TransactionLog,
        tables: Mapping[str, Table],
    ) -> None:
        """log: of the store, for those who change the tables. tables: opened before, by name."""
        self.name = name
        self.log = log
        self.uri = result_uri(store, self.kind, name)
        self.options = options
        self.tables = dict(tables)
        self.prepare()

    def prepare(self) -> None:
        """What a kind keeps beside its tables; called once they are open."""

    @classmethod
    def open_or_make(cls, store: str, name: str, options: storage.Options, log: TransactionLog | None = None) -> Self:
        """The tables of NAME, made where there are none, for a job that is about to change them.

        Raises JobError for tables whose log is gone.
        """
        result_uri(store, cls.kind, name)
        log = log or TransactionLog(store, options)
        make_tables(log, {f"{cls.kind}/{name}/{table}": schema for table, schema in cls.schemas.items()}, cls.command)
        made = cls.open_existing(store, name, options, log)
        assert made is not None
        return made

    @classmethod
    def open_existing(
        cls, store: str, name: str, options: storage.Options, log: TransactionLog | None = None
    ) -> Self | None:
        """The tables of NAME, or None where there are none yet; nothing is written.

        They belong together, also where a run was killed while it changed them, or is at it.

        Raises DamagedLog where the log of a table is damaged, or gone while another table has rows.
        """
        result_uri(store, cls.kind, name)
        log = log or TransactionLog(store, options)
        current = snapshot(log)
        tables: dict[str, Table] = {}
        for table, schema in cls.schemas.items():
            if (found := current.table(f"{cls.kind}/{name}/{table}", schema)) is not None:
                tables[table] = found
        if len(tables) < len(cls.schemas):
            lost = [table for table in cls.schemas if table not in tables]
            if any(table.files() for table in tables.values()):
                place = storage.join(result_uri(store, cls.kind, name), lost[0])
                raise DamagedLog(f"The log of {place} is gone: {run_repair(log.uri)}.")
            return None
        return cls(store, name, options, log, tables)

    @classmethod
    def all_in(cls, store: str, options: storage.Options) -> dict[str, Self]:
        """Every result of this kind in a store, by NAME."""
        found = {name: cls.open_existing(store, name, options) for name in result_names(store, cls.kind, options)}
        return {name: result for name, result in found.items() if result is not None}

    def path_of(self, table: str) -> str:
        """A table's path in the store: clusters/words/centroids."""
        return f"{self.path}/{table}"

    def refresh(self) -> None:
        """See what others committed."""
        for table in self.tables.values():
            table.refresh()

    def version(self) -> str:
        return self.tables[self.leading].content_identity

    def missing(self) -> str:
        return next((said for table in self.tables.values() if (said := table.missing_file())), "")

    def counts(self) -> dict[str, int]:
        files = [file for table in self.tables.values() for file in table.files().values()]
        return self.row_counts() | {"files": len(files), "bytes": sum(file.size for file in files)}

    @abstractmethod
    def row_counts(self) -> dict[str, int]:
        """What its rows are, as stats shows it."""
