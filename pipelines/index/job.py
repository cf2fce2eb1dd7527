"""index: embeddings or patches of a store become a FAISS index that is kept up to date in place.

what changed since the index -> take out what changed or is gone -> add what changed or is new -> publish
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from pipelines.errors import RequestError
from pipelines.index.changes import Changes, changes_since, everything
from pipelines.index.update import build, memory_budget, update, worn
from pipelines.results.index_publishing import AnotherUpdate, publish, remove_unneeded
from pipelines.results.index_vectors import check_store, held_settings
from pipelines.results.indices import Manifest, index_path, index_uri, read_manifest, remove_files
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.differences import differences
from pipelines.settings.sections import Config, IndexSettings
from pipelines.store.changes import Pointer
from pipelines.store.snapshots import snapshot
from pipelines.store.store import Store


@dataclass
class Result(JobResult):
    """What a run of index did, or would do.

    why: the reason for the kind. memory_bytes: estimate of what the index
    takes in a search. images: that the index covers. count: vectors that a search can return. added, changed, removed:
    images. dead: removed vectors that still take space. segments: the base, and what came later and is not merged into
    it. rebuilt: why an existing index was built again from scratch. images_version: of the images table.
    """

    name: str
    of: str
    kind: str = ""
    why: str = ""
    memory_bytes: int = 0
    images: int = 0
    count: int = 0
    dimension: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    dead: int = 0
    segments: int = 0
    rebuilt: str = ""
    images_version: int = 0


def run(config: Config, *, store: str, name: str, dry_run: bool = False) -> Result:
    """Build index/NAME of `store`, or bring it up to date: nothing is trained again.

    Raises:
        RequestError: the request was wrong, or the index was made with other settings or of another spec.
        JobError: the job failed; the index stays as it was.
    """
    started = time.monotonic()
    opened = Store.open(store, config) if dry_run else Store.open_for_writing(store, config)
    check_store(opened, config.index)
    result = Result(new_run_id(), opened.uri, name, config.index.of)
    plan = _plan(opened, config.index, result)
    if dry_run:
        return result.ended("dry_run", started)
    if plan.up_to_date(result):
        return _unchanged(plan, result).ended("unchanged", started)

    report = RunReport("index", opened.uri, config, result.run_id, {"name": name})
    with recorded(report, result, started, told=opened.log.messages, fingerprint=opened.fingerprint):
        manifest = _bring_up_to_date(opened, config.index, plan, result)
        _describe(result, manifest)
        if manifest.memory_bytes > (budget := memory_budget(config.index)):
            result.messages.append(
                f"The index {name} grew to {manifest.memory_bytes / 1e9:.3g} GB, but index.memory_gb is "
                f"{budget / 1e9:.3g}: give another index.kind to build it again."
            )
    return result


@dataclass(frozen=True)
class _Plan:
    """What an index lacks. before, pointer: as it is, and where the store's log points; None for a new one."""

    before: Manifest | None
    pointer: Pointer | None
    changes: Changes

    def up_to_date(self, result: Result) -> bool:
        same = self.before is not None and self.before.images_version == self.changes.version
        return same and not self.changes and not result.rebuilt


def _plan(store: Store, asked: IndexSettings, result: Result) -> _Plan:
    """Raises RequestError where the index has other contents than are asked for."""
    name, current = result.name, snapshot(store.log)
    before = read_manifest(store, name, current)
    if before is not None:
        _refuse_other_content(store, name, before, asked)
    changes = changes_since(store, name, before) if before else everything(store)
    result.images_version, result.changed = changes.version, changes.changed
    result.added, result.removed = len(changes.fresh) - changes.changed, len(changes.gone) - changes.changed
    result.images = (before.images if before else 0) + result.added - result.removed
    result.rebuilt = ""
    if before and asked.kind not in ("auto", before.kind):
        result.rebuilt = f"kind {asked.kind} was asked for in place of {before.kind}"
    elif before and before.kind == "hnsw":
        result.rebuilt = worn(before, changes.gone)
    return _Plan(before, current.pointers.get(index_path(name)), changes)


def _unchanged(plan: _Plan, result: Result) -> Result:
    assert plan.before
    _describe(result, plan.before)
    return result


def _bring_up_to_date(store: Store, asked: IndexSettings, plan: _Plan, result: Result) -> Manifest:
    """The manifest of the index as it should be, once readers find it.

    Where another run changes the index at the same time, this one begins again from what that one made.
    """
    files_id = result.run_id
    while True:
        try:
            return _published(store, asked, plan, result, files_id)
        except AnotherUpdate:
            store.refresh()
            plan = _plan(store, asked, result)
            if plan.before and plan.up_to_date(result):
                result.status = "unchanged"
                return plan.before
            # names that another run is about to remove as leftovers are not used again
            files_id = new_run_id()


def _published(store: Store, asked: IndexSettings, plan: _Plan, result: Result, files_id: str) -> Manifest:
    """The manifest that readers find from now on.

    What a run wrote that fails before it asked for that is removed; from then on the next update does it, since nobody
    here can say whether the index is the new one.

    Raises AnotherUpdate.
    """
    name, before = result.name, plan.before
    files: set[str] = set()
    try:
        if before is None:
            manifest = build(store, asked, name, plan.changes, None, files_id, files)
        elif result.rebuilt:
            manifest = build(store, asked, name, everything(store), before, files_id, files)
        else:
            manifest = update(store, asked, name, before, plan.changes, files_id, files)
    except BaseException:
        remove_files(store, name, files)
        raise
    try:
        return publish(store, name, replace(manifest, run_id=result.run_id), before, plan.pointer)
    except AnotherUpdate:
        remove_unneeded(store, name, files)
        raise


def _refuse_other_content(store: Store, name: str, before: Manifest, asked: IndexSettings) -> None:
    differing = differences(before.holds, held_settings(asked), "index.{key} {before}, requested {asked}")
    if differing:
        raise RequestError(
            f"The index {name} has {'; '.join(differing)}: give its settings again, another NAME for these, or remove "
            f"{index_uri(store.uri, name)}."
        )


def _describe(result: Result, manifest: Manifest) -> None:
    result.kind, result.why, result.dimension = manifest.kind, manifest.why, manifest.dimension
    result.images, result.count, result.dead = manifest.images, manifest.count, manifest.dead
    result.memory_bytes, result.segments = manifest.memory_bytes, len(manifest.segments)
