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
from pipelines.results.parts import PartTables
from pipelines.results.stored import Findings, ResultTables, StoredResult
from pipelines.store.linked_tables import LinkedTables
from pipelines.store.store import Store


class StoredIndex(StoredResult):
    """index/NAME: FAISS files and the manifest that names them."""

    kind = "index"

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self.tables = {}
        self._store = store

    @classmethod
    def all_in(cls, store: Store) -> Iterator[StoredIndex]:
        """Every index of a store."""
        return (cls(store, name) for name in index_names(store))

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
    """find: every result of the kind in a store. check: whether one holds what it says, given image_id and run_id of
    every row of the store's images table."""

    find: Callable[[Store], Iterable[StoredResult]]
    check: Callable[[Store, Any, pa.Table], Findings]


def _of_tables(kind: type[ResultTables], disagreements: Callable[[Any], Iterator[str]]) -> ResultKind:
    return ResultKind(
        find=lambda store: kind.all_in(store.uri, store.config.storage.options).values(),
        check=lambda store, result, images: Findings(problems=list(disagreements(result))),
    )


KINDS: dict[str, ResultKind] = {
    "matches": _of_tables(MatchTables, match_checks.disagreements),
    "clusters": _of_tables(ClusterTables, cluster_checks.disagreements),
    "parts": _of_tables(PartTables, part_checks.disagreements),
    "index": ResultKind(StoredIndex.all_in, lambda store, result, images: check_index(store, result.name, images)),
}


def all_results(store: Store) -> Iterator[StoredResult]:
    """Everything that jobs left in a store besides the extraction, kind by kind, by NAME."""
    for kind in KINDS.values():
        yield from kind.find(store)


def check_result(store: Store, result: StoredResult, images: pa.Table) -> Findings:
    """Whether a result holds what it says."""
    return KINDS[result.kind].check(store, result, images)


def find_result(store: Store, path: str) -> StoredResult | None:
    """A result by its path, such as clusters/words; None when there is none."""
    kind, _, name = path.partition("/")
    return next((result for result in KINDS[kind].find(store) if result.name == name), None)
