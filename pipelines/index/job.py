"""index: embeddings or patches of a store become a FAISS index that is kept up to date in place.

what changed since the index -> take out what changed or is gone -> add what changed or is new -> publish
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipelines.errors import RequestError
from pipelines.index.changes import Changes, everything, find_changes
from pipelines.index.update import build, memory_budget, update, worn
from pipelines.results.index_vectors import check_store, held_settings
from pipelines.results.indices import Manifest, index_uri, live_files, publish, read_manifest, remove_files
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.differences import differences
from pipelines.settings.sections import Config, IndexSettings
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
    asked = config.index
    opened = Store.open(store, config)
    check_store(opened, asked)
    before = read_manifest(opened, name)
    if before is not None:
        _refuse_other_content(opened, name, before, asked)
    changes = find_changes(opened, name, before) if before else everything(opened)
    result = Result(new_run_id(), opened.uri, name, asked.of, images_version=changes.version)
    result.changed = changes.changed
    result.added, result.removed = len(changes.fresh) - changes.changed, len(changes.gone) - changes.changed
    result.images = (before.images if before else 0) + result.added - result.removed
    if before and asked.kind not in ("auto", before.kind):
        result.rebuilt = f"kind {asked.kind} was asked for in place of {before.kind}"
    elif before and before.kind == "hnsw":
        result.rebuilt = worn(before, changes.gone)
    if dry_run:
        return result.ended("dry_run", started)
    if before and not changes and not result.rebuilt and before.images_version == result.images_version:
        _describe(result, before)
        return result.ended("unchanged", started)

    report = RunReport("index", opened.uri, config, result.run_id, {"name": name})
    with recorded(report, result, started, fingerprint=opened.fingerprint):
        manifest = _published(opened, asked, name, before, changes, result)
        _describe(result, manifest)
        if manifest.memory_bytes > (budget := memory_budget(asked)):
            result.messages.append(
                f"The index {name} grew to {manifest.memory_bytes / 1e9:.3g} GB, but index.memory_gb is "
                f"{budget / 1e9:.3g}: give another index.kind to build it again."
            )
    return result


def _published(
    store: Store, asked: IndexSettings, name: str, before: Manifest | None, changes: Changes, result: Result
) -> Manifest:
    """The manifest of the index as it should be, once it is visible.

    What a failed run wrote is removed, except what the index names: the run may fail after it has published, while
    others build on it.
    """
    files_of_run: set[str] = set()
    try:
        manifest = _bring_up_to_date(store, asked, name, before, changes, result, files_of_run)
        publish(store, name, manifest, before)
    except BaseException:
        remove_files(store, name, files_of_run - live_files(store, name))
        raise
    return manifest


def _refuse_other_content(store: Store, name: str, before: Manifest, asked: IndexSettings) -> None:
    differing = differences(before.holds, held_settings(asked), "index.{key} {before}, requested {asked}")
    if differing:
        raise RequestError(
            f"The index {name} has {'; '.join(differing)}: give its settings again, another NAME for these, or remove "
            f"{index_uri(store.uri, name)}."
        )


def _bring_up_to_date(
    store: Store,
    asked: IndexSettings,
    name: str,
    before: Manifest | None,
    changes: Changes,
    result: Result,
    files: set[str],
) -> Manifest:
    """The manifest of the index as it should be, its files written and named in `files`."""
    if before is None:
        return build(store, asked, name, changes, None, result.run_id, files)
    if result.rebuilt:
        return build(store, asked, name, everything(store), before, result.run_id, files)
    return update(store, asked, name, before, changes, result.run_id, files)


def _describe(result: Result, manifest: Manifest) -> None:
    result.kind, result.why, result.dimension = manifest.kind, manifest.why, manifest.dimension
    result.images, result.count, result.dead = manifest.images, manifest.count, manifest.dead
    result.memory_bytes, result.segments = manifest.memory_bytes, len(manifest.segments)
