"""correspond: pairs of images become rows of matches/NAME/pairs and matches/NAME/matches.

    pairs asked for -> what is left -> tiles of images on Ray: read once, match, write -> the driver commits them

A pair is done when its row in `pairs` is committed, for the extraction of both images that it names.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.correspond.pairs import Pairs, choose_pairs, embeddings_of, scores, unordered_keys
from pipelines.errors import counted
from pipelines.results.made_with import MadeWith
from pipelines.results.matches import PAIR_VERSION_COLUMNS, MatchTables, matches_uri
from pipelines.results.same_extraction import same_extraction
from pipelines.running.commits import WaitingReports
from pipelines.running.interrupts import interruptible
from pipelines.running.metrics import JobMetrics
from pipelines.running.progress import ProgressLine
from pipelines.running.ray_session import ray_session
from pipelines.running.reports import IncrementalResult, RunReport, new_run_id, recorded
from pipelines.settings.sections import Config, CorrespondSettings
from pipelines.store.schemas import descriptor_columns
from pipelines.store.store import Store

if TYPE_CHECKING:
    from pipelines.results.matches import MatchReport


@dataclass
class Result(IncrementalResult):
    """What a run of correspond did, or would do.

    source: knn, all or file. images: in the store. pairs: those asked for. matched, matches: pairs and rows, by this
    run. without_matches: matched pairs with kept = 0. outdated: pairs removed because an image was extracted again or
    is gone. changed_meanwhile: pairs not kept, since an image was extracted again, or removed, while they were matched.
    pairs_per_second: from the start of Ray to the last pair; steady_pairs_per_second: once workers are warm.
    bytes_read: of patches.
    """

    name: str
    source: str = ""
    images: int = 0
    pairs: int = 0
    matched: int = 0
    matches: int = 0
    without_matches: int = 0
    outdated: int = 0
    changed_meanwhile: int = 0
    pairs_per_second: float = 0.0
    steady_pairs_per_second: float = 0.0


def run(config: Config, *, store: str, name: str, pairs: str | None = None, dry_run: bool = False) -> Result:
    """Match pairs of images of `store`; a second call does only pairs that are new or whose images changed.

    Args:
        name: NAME of the result, matches/NAME in the store.
        pairs: used in place of correspond.pairs: `knn:K`, `all` or a file.
        dry_run: choose pairs and plan only; nothing is written.

    Raises:
        RequestError: the request was wrong.
        JobError: the job failed; what was committed stays.
    """
    started = time.monotonic()
    if pairs is not None:
        config = config.model_copy(update={"correspond": config.correspond.model_copy(update={"pairs": pairs})})
    asked, options = config.correspond, config.storage.options
    opened = (Store.open if dry_run else Store.open_for_writing)(store, config)
    result = Result(run_id=new_run_id(), store=opened.uri, name=name)
    matches_uri(opened.uri, name)
    opened.requires(
        "matching",
        whole_grid=True,
        saliency=True,
        descriptor=("correspond.descriptor", asked.descriptor),
        images=True,
    )
    made_with = MadeWith.of("correspond", opened.uri, name, asked, how_to_match, options)
    made_with.check()
    images = _images(opened, with_embeddings=asked.pairs.startswith("knn:") or opened.config.features.embedding)
    chosen = choose_pairs(asked.pairs, images, options)
    result.images, result.pairs, result.source = len(images), len(chosen), chosen.source
    result.messages += chosen.messages
    if dry_run:
        tables = MatchTables.open_existing(opened.uri, name, options)
        _plan(tables, chosen, images, result)
        return result.ended("dry_run", started)

    report = RunReport("correspond", opened.uri, config, result.run_id, {"name": name, "pairs": asked.pairs})
    with recorded(report, result, started, told=opened.log.messages, fingerprint=opened.fingerprint):
        made_with.check(record=True)
        tables = MatchTables.open_or_make(opened.uri, name, options, opened.log)
        result.repaired = {what: count for what, count in tables.repair(result.run_id).items() if count}
        outdated = tables.drop_outdated(result.run_id)
        pending = _plan(tables, chosen, images, result)
        result.outdated = outdated
        result.seconds["plan"] = time.monotonic() - started
        if len(pending):
            _match_pending(opened, tables, pending, images, config, result)
        if result.changed_meanwhile:
            result.messages.append(
                f"{counted(result.changed_meanwhile, 'pair')} had an image that was extracted again, or removed, "
                "meanwhile, and nothing of them was kept: run the same command again."
            )
    return result


def how_to_match(settings: CorrespondSettings) -> dict[str, Any]:
    """The settings that matches/NAME has for life: not what is matched, nor in what order."""
    return settings.model_dump(mode="json", exclude={"pairs", "tile_images"})


def _images(store: Store, *, with_embeddings: bool) -> pa.Table:
    """What matching needs to know of each image, in key order."""
    columns = ["image_id", "label", "grid_height", "grid_width", "shard", "run_id"]
    table = store.images.read([*columns, "embedding"] if with_embeddings else columns)
    return table.sort_by("image_id").combine_chunks()


def _plan(tables: MatchTables | None, chosen: Pairs, images: pa.Table, result: Result) -> Pairs:
    """Pairs that are left; pairs in the table whose images were extracted again since, or are gone, are counted."""
    kept = np.ones(len(chosen), bool)
    if tables is not None:
        rows = tables.pairs.read(PAIR_VERSION_COLUMNS)
        a, current_a = _current(rows["image_a"], rows["run_id_a"], images)
        b, current_b = _current(rows["image_b"], rows["run_id_b"], images)
        current = current_a & current_b
        done = unordered_keys(a[current], b[current], len(images))
        kept = ~np.isin(chosen.keys(len(images)), done)
        result.outdated = int((~current).sum())
    result.pending = int(kept.sum())
    result.already_done = len(chosen) - result.pending
    return chosen.take(kept)


def _current(ids: pa.ChunkedArray, runs: pa.ChunkedArray, images: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Positions of ids in images (0 for unknown ones), and whether each still has the same extraction."""
    at, same = same_extraction(ids, runs, images)
    return np.asarray(pc.fill_null(at, 0), np.int64), np.asarray(same, bool)


def _match_pending(
    store: Store, tables: MatchTables, pending: Pairs, images: pa.Table, config: Config, result: Result
) -> None:
    """Match and commit every pending pair."""
    # Ray and torch are needed from here on
    from pipelines.correspond.tiles import plan_matching, stream_matches
    from pipelines.correspond.worker import MatchSetup
    from pipelines.store.vectors import BYTES_PER_VALUE

    has_embeddings = "embedding" in images.column_names and not images["embedding"].null_count
    pair_scores = scores(pending, embeddings_of(images, config.correspond.pairs)) if has_embeddings else None
    spec = store.config.model_copy(update={"correspond": config.correspond})
    files = store.patches.files().values()
    stored = sum(file.size for file in files) / sum(file.rows for file in files) / len(descriptor_columns(spec))
    values = stored / BYTES_PER_VALUE[spec.store.dtype]
    with ray_session(config.run) as resources, interruptible(), ProgressLine(len(pending), "pairs") as progress:
        layout = plan_matching(resources, config)
        setup = MatchSetup(store.uri, tables.uri, result.run_id, spec, layout.device)
        commits = Commits(tables, config, result)
        try:
            # closed while Ray is there
            with contextlib.closing(stream_matches(setup, pending, pair_scores, images, values, layout)) as reports:
                for report in reports:
                    progress.advance(len(report.kept), 0)
                    commits.take(report)
        finally:
            # an interruption keeps what is finished
            commits.commit()
            result.steady_pairs_per_second = round(progress.steady_images_per_second, 2)
            result.pairs_per_second = round(progress.mean_images_per_second, 2)


class Commits:
    """Reports that wait for the next commit, and what they add up to."""

    def __init__(self, tables: MatchTables, config: Config, result: Result) -> None:
        self._tables = tables
        self._result = result
        self._metrics = JobMetrics("correspond")
        self._waiting = WaitingReports(config.run.commit_seconds, self._commit, result, self._metrics)
        self._reads: dict[str, tuple[int, float]] = {}

    def take(self, report: MatchReport) -> None:
        """Count a report; commit when what waits has waited long enough."""
        self._reads |= report.reads
        self._waiting.spent(report.seconds)
        self._waiting.add(report)
        self._waiting.commit_when_due()

    def commit(self) -> None:
        """Commit what waits; an interruption comes after it."""
        self._waiting.commit()

    def _commit(self, reports: list[MatchReport]) -> None:
        kept = [rows for report in self._tables.commit(reports, self._result.run_id) for rows in report.kept.values()]
        result = self._result
        result.changed_meanwhile += self._tables.changed_meanwhile
        result.done_elsewhere += (
            sum(len(report.kept) for report in reports) - len(kept) - self._tables.changed_meanwhile
        )
        result.matched += len(kept)
        result.matches += sum(kept)
        result.without_matches += kept.count(0)
        written = sum(report.bytes_written for report in reports)
        result.bytes_written += written
        read = sum(read for read, _ in self._reads.values())
        self._metrics.read(read - result.bytes_read)
        result.bytes_read = read
        result.seconds["read"] = sum(spent for _, spent in self._reads.values())
        self._metrics.committed(len(kept), written)
