"""Every kind of result that jobs leave in a store. A new kind is one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.errors import counted
from pipelines.results import cluster_checks, match_checks, part_checks
from pipelines.results.clusters import ClusterTables
from pipelines.results.index_checks import check_index
from pipelines.results.indices import files_present, index_names, manifest_file, read_manifest, valid_manifest
from pipelines.results.matches import MatchTables
from pipelines.results.names import result_names
from pipelines.results.parts import PartTables
from pipelines.results.stored import Findings, ResultTables, StoredResult
from pipelines.store.damage import DamagedLog
from pipelines.store.findings import Finding
from pipelines.store.linked_tables import LinkedTables
from pipelines.store.store import Store


class StoredIndex(StoredResult):
    """index/NAME: FAISS files and the manifest that names them."""

    kind = "index"

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self.tables = {}
        self._store = store

    def version(self) -> str:
        return valid_manifest(self._store, self.name).removeprefix("manifest-").removesuffix(".json")

    def missing(self) -> str:
        manifest = read_manifest(self._store, self.name)
        if manifest is None:
            return f"{self.path} has no manifest"
        named = manifest.files | {manifest_file(manifest.number)}
        gone = sorted(named - files_present(self._store, self.name))
        return f"{self.path}/{gone[0]} is missing" if gone else ""

    def counts(self) -> dict[str, int]:
        manifest = read_manifest(self._store, self.name)
        return {} if manifest is None else {"images": manifest.images, "vectors": manifest.count}

    def describe(self, counts: dict[str, int]) -> str:
        return f"{counted(counts.get('vectors', 0), 'vector')} of {counted(counts.get('images', 0), 'image')}"

    def linked_tables(self) -> Iterator[LinkedTables]:
        return iter(())


@dataclass(frozen=True)
class ResultKind:
    """tables: their names. names: of folders that may hold a result of the kind. open: one by its NAME, None where
    there is none. check: whether one holds what it says, given image_id and run_id of every row of the store's images.
    """

    tables: tuple[str, ...]
    names: Callable[[Store], Iterable[str]]
    open: Callable[[Store, str], StoredResult | None]
    check: Callable[[Store, Any, pa.Table], Findings]


def _of_tables(kind: type[ResultTables], disagreements: Callable[[Any], Iterator[Finding]]) -> ResultKind:
    return ResultKind(
        tables=tuple(kind.schemas),
        names=lambda store: result_names(store.uri, kind.kind, store.config.storage.options),
        open=lambda store, name: kind.open_existing(store.uri, name, store.config.storage.options, store.log),
        check=lambda store, result, images: Findings(problems=list(disagreements(result))),
    )


KINDS: dict[str, ResultKind] = {
    "matches": _of_tables(MatchTables, match_checks.disagreements),
    "clusters": _of_tables(ClusterTables, cluster_checks.disagreements),
    "parts": _of_tables(PartTables, part_checks.disagreements),
    "index": ResultKind(
        (), index_names, StoredIndex, lambda store, result, images: check_index(store, result.name, images)
    ),
}


def all_results(store: Store) -> Iterator[StoredResult]:
    """Everything that jobs left in a store besides the extraction, kind by kind, by NAME.

    Raises DamagedLog for the first of which the log of a table is damaged, or lost.
    """
    for _, result in look_at_results(store):
        if isinstance(result, DamagedLog):
            raise result
        yield result


def look_at_results(store: Store) -> Iterator[tuple[str, StoredResult | DamagedLog]]:
    """The same with the path of each, such as clusters/words; in place of one that cannot be opened, why not."""
    for kind, of_kind in KINDS.items():
        for name in of_kind.names(store):
            try:
                found = of_kind.open(store, name)
            except DamagedLog as error:
                yield f"{kind}/{name}", error
                continue
            if found is not None:
                yield found.path, found


def check_result(store: Store, result: StoredResult, images: pa.Table) -> Findings:
    """Whether a result holds what it says."""
    return KINDS[result.kind].check(store, result, images)


def find_result(store: Store, path: str) -> StoredResult | None:
    """A result by its path, such as clusters/words; None when there is none."""
    kind, _, name = path.partition("/")
    return KINDS[kind].open(store, name) if name in KINDS[kind].names(store) else None
