"""cosegment: what the images of a set have in common becomes rows of parts/NAME/images and parts/NAME/patches.

    sets asked for -> what is left -> tasks on Ray: fit a set, segment its images, write -> the driver commits them

A set is done when the rows of all its images are committed, for the members and their extraction that they name.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ops.cosegmentation import inliers
from pipelines import storage
from pipelines.cosegment.masks import MOST_PARTS_IN_A_MASK, SetImage
from pipelines.cosegment.set_versions import SetVersions
from pipelines.cosegment.sets import ImageSets, choose_sets, set_version, source_of
from pipelines.cosegment.tasks import PendingSet, plan_segmentation, stream_reports
from pipelines.cosegment.worker import SegmentSetup
from pipelines.errors import JobError, RequestError, counted
from pipelines.features.same_features import spec_with_weights
from pipelines.results.made_with import MadeWith
from pipelines.results.parts import VERSIONED, PartTables, SegmentReport, parts_uri
from pipelines.results.same_extraction import same_extraction
from pipelines.running.commits import WaitingReports
from pipelines.running.interrupts import interruptible
from pipelines.running.layout import Layout
from pipelines.running.metrics import JobMetrics
from pipelines.running.progress import ProgressLine
from pipelines.running.ray_session import ray_session
from pipelines.running.reports import IncrementalResult, RunReport, new_run_id, recorded
from pipelines.running.tasks import as_task, finished_tasks
from pipelines.settings.sections import Config, CosegmentSettings
from pipelines.store.originals import locate
from pipelines.store.patches import ImagePlace
from pipelines.store.schemas import PARTS_IMAGES
from pipelines.store.store import Store

MOST_FAILED_SHOWN = 3


@dataclass
class Result(IncrementalResult):
    """What a run of cosegment did, or would do. An image counts once for each set that it is in.

    source: label, directory, cluster:NAME or file. sets: those asked for. images: in the sets. segmented: images, by
    this run; of them, without_foreground have nothing in mask_png, and noted have a note in their row. outdated: rows
    removed because the members of their set, or an extraction, changed. changed_meanwhile: images not kept, since
    members of their set changed while it was segmented. failed_sets: set_id -> why. exported: files that --masks and
    --overlays wrote. images_per_second: from the start of Ray to the last image. bytes_read: of patches.
    """

    name: str
    source: str = ""
    sets: int = 0
    images: int = 0
    pending_sets: int = 0
    segmented: int = 0
    without_foreground: int = 0
    noted: int = 0
    outdated: int = 0
    changed_meanwhile: int = 0
    failed_sets: dict[str, str] = field(default_factory=dict)
    exported: int = 0
    images_per_second: float = 0.0


def run(
    config: Config,
    *,
    store: str,
    name: str,
    sets: str | None = None,
    masks: str | None = None,
    overlays: str | None = None,
    dry_run: bool = False,
) -> Result:
    """Co-segment sets of images of `store`; a second call does only sets that are new or whose images changed.

    Args:
        name: NAME of the result, parts/NAME in the store.
        sets: used in place of cosegment.sets.
        masks: also write all masks of NAME as PNG files below this folder or URI.
        overlays: also draw them over their pictures, below this folder or URI.
        dry_run: choose sets and plan only; nothing is written.

    Raises:
        RequestError: the request was wrong.
        JobError: the job failed, or some sets could not be fitted; what was committed stays.
    """
    started = time.monotonic()
    if sets is not None:
        config = config.model_copy(update={"cosegment": config.cosegment.model_copy(update={"sets": sets})})
    asked, options = config.cosegment, config.storage.options
    opened = (Store.open if dry_run else Store.open_for_writing)(store, config)
    result = Result(run_id=new_run_id(), store=opened.uri, name=name)
    parts_uri(opened.uri, name)
    _check_store(opened, config)
    spec = opened.config
    if asked.crop_augmentations:
        spec = spec_with_weights(opened, config, "cosegment.crop_augmentations")
    spec = spec.model_copy(update={"cosegment": asked, "run": config.run})
    made_with = MadeWith.of("cosegment", opened.uri, name, asked, how_to_segment, options)
    made_with.check()
    images = _images(opened, with_embeddings=asked.remove_outliers)
    chosen = choose_sets(asked.sets, opened.uri, images, options)
    result.source, result.sets, result.images = chosen.source, len(chosen), chosen.images
    result.messages += chosen.messages
    if dry_run:
        _plan(PartTables.open_existing(opened.uri, name, options), chosen, images, asked, result)
        return result.ended("dry_run", started)

    report = RunReport("cosegment", opened.uri, config, result.run_id, {"name": name, "sets": asked.sets})
    with recorded(report, result, started, told=opened.log.messages, fingerprint=opened.fingerprint):
        made_with.check(record=True)
        tables = PartTables.open_or_make(opened.uri, name, options, opened.log)
        result.repaired = {what: count for what, count in tables.repair(result.run_id).items() if count}
        pending, outdated = _plan(tables, chosen, images, asked, result)
        while tables.drop(outdated, result.run_id, planned_on=opened.images.version) is None:
            opened.images.refresh()
            images = _images(opened, with_embeddings=asked.remove_outliers)
            chosen = choose_sets(asked.sets, opened.uri, images, options)
            pending, outdated = _plan(tables, chosen, images, asked, result)
        tables.set_versions = SetVersions(opened, asked.sets, pending)
        result.seconds["plan"] = time.monotonic() - started
        if pending or masks or overlays:
            with ray_session(config.run) as resources, interruptible():
                layout = plan_segmentation(resources, config)
                _segment_pending(opened, tables, pending, images, spec, layout, resources, result)
                if masks or overlays:
                    _export(tables, images, masks, overlays, layout, by_set=not chosen.whole, result=result)
        if result.changed_meanwhile:
            result.messages.append(
                f"{counted(result.changed_meanwhile, 'image')} of sets whose members were extracted again, or changed "
                "otherwise, meanwhile were not kept: run the same command again."
            )
        if result.failed_sets:
            raise JobError(_about_failed(result))
    return result


def how_to_segment(settings: CosegmentSettings) -> dict[str, Any]:
    """The settings that parts/NAME has for life. Of `sets` the kind counts, and not which file."""
    return settings.model_dump(mode="json") | {"sets": source_of(settings.sets)}


def _check_store(store: Store, config: Config) -> None:
    """Raises RequestError for a store whose images cannot be co-segmented, and for settings that do not go with it."""
    asked = config.cosegment
    store.requires(
        "co-segmentation",
        whole_grid=True,
        saliency=True,
        descriptor=("cosegment.descriptor", asked.descriptor),
        images=True,
    )
    store.requires("cosegment.remove_outliers", embedding=asked.remove_outliers)
    if asked.num_parts > MOST_PARTS_IN_A_MASK:
        raise RequestError(
            f"cosegment.num_parts is {asked.num_parts}, but a mask can tell at most {MOST_PARTS_IN_A_MASK} apart."
        )


def _images(store: Store, *, with_embeddings: bool) -> pa.Table:
    """What co-segmentation needs to know of each image, in key order."""
    columns = ["image_id", "label", "uri", "source_size", "source_version", "width", "height", "model_width"]
    columns += ["model_height", "grid_width", "grid_height", "shard", "run_id"]
    table = store.images.read([*columns, "embedding"] if with_embeddings else columns)
    return table.filter(pc.is_valid(table["shard"])).sort_by("image_id").combine_chunks()


def _plan(
    tables: PartTables | None, chosen: ImageSets, images: pa.Table, asked: CosegmentSettings, result: Result
) -> tuple[list[PendingSet], pa.Table]:
    """Sets that have images left to segment, and rows of the table that are outdated."""
    versions = {set_id: set_version(images, members) for set_id, members in chosen.members.items()}
    done, outdated = _rows_there(tables, versions, images, whole=chosen.whole)
    pending = []
    for set_id, members in chosen.members.items():
        left = np.setdiff1d(members, done[set_id]) if set_id in done else members
        if len(left):
            outliers = _outliers(images, members, asked) if asked.remove_outliers else members[:0]
            pending.append(PendingSet(set_id, versions[set_id], members, left, outliers))
    result.pending = sum(len(one.left) for one in pending)
    result.pending_sets = len(pending)
    result.already_done = chosen.images - result.pending
    result.outdated = len(outdated)
    return pending, outdated


def _rows_there(
    tables: PartTables | None, versions: dict[str, str], images: pa.Table, *, whole: bool
) -> tuple[dict[str, np.ndarray], pa.Table]:
    """(images done of each set, by position; outdated rows, VERSIONED).

    A set that is not asked for is outdated too when the sets are `whole`, and otherwise when one of its images is.
    """
    if tables is None:
        return {}, pa.schema([PARTS_IMAGES.field(name) for name in VERSIONED]).empty_table()
    rows = tables.images.read([*VERSIONED, "run_id"]).sort_by("set_id").combine_chunks()
    asked_for = pa.array([versions.get(set_id) for set_id in rows["set_id"].to_pylist()], pa.string())
    current = _equal(rows["set_version"], pa.chunked_array([asked_for]))
    at, same_image = same_extraction(rows["image_id"], rows["run_id"], images)
    broken = pc.unique(rows["set_id"].filter(pc.invert(same_image)))
    kept = current
    if not whole:
        kept = kept | (np.asarray(pc.is_null(asked_for)) & ~np.asarray(pc.is_in(rows["set_id"], value_set=broken)))
    positions = np.asarray(pc.fill_null(at, 0), np.int64)[current]
    set_ids = rows["set_id"].filter(pa.array(current)).to_pylist()
    starts = [number for number in range(len(set_ids)) if not number or set_ids[number] != set_ids[number - 1]]
    done = {set_ids[first]: part for first, part in zip(starts, np.split(positions, starts)[1:], strict=True)}
    return done, rows.select(VERSIONED).filter(pa.array(~kept))


def _outliers(images: pa.Table, members: np.ndarray, asked: CosegmentSettings) -> np.ndarray:
    """Which members are unlike the others of their set; positions."""
    embeddings = pc.list_flatten(images["embedding"].take(pa.array(members))).to_numpy().reshape(len(members), -1)
    return members[~inliers(embeddings, asked.outliers_threshold)]


def _equal(a: Any, b: Any) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.equal(a, b), False), bool)


def _segment_pending(
    store: Store,
    tables: PartTables,
    pending: list[PendingSet],
    images: pa.Table,
    spec: Config,
    layout: Layout,
    resources: dict[str, float],
    result: Result,
) -> None:
    """Segment and commit every pending set."""
    if not pending:
        return
    weights = store.spec["model"]["weights"]
    setup = SegmentSetup(store.uri, tables.uri, result.run_id, spec, weights, layout.device, 0.0)
    with ProgressLine(result.pending) as progress:
        described = SetImages(images, pending, spec)
        commits = Commits(tables, spec, result)
        try:
            # closed while Ray is there
            with contextlib.closing(stream_reports(setup, pending, described.at, layout, resources)) as reports:
                for report in reports:
                    progress.advance(len(report.keys), 0)
                    commits.take(report)
        finally:
            # an interruption keeps what is finished
            commits.commit()
            result.images_per_second = round(progress.mean_images_per_second, 2)


def _export(
    tables: PartTables,
    images: pa.Table,
    masks: str | None,
    overlays: str | None,
    layout: Layout,
    *,
    by_set: bool,
    result: Result,
) -> None:
    """Write every mask of NAME as a file."""
    from pipelines.cosegment.export import Export, export_file, exported_images

    began = time.monotonic()
    masks, overlays = (storage.normalise(uri) if uri else None for uri in (masks, overlays))
    export = Export(tables.uri, masks, overlays, by_set, tables.options)
    names, uris = exported_images(tables, images)
    export_task = as_task(export_file, layout, gpu=False)

    def tasks() -> Iterator[Any]:
        for path in tables.images.files():
            ids = set(tables.images.read_file(path, ["image_id"])["image_id"].to_pylist())
            known = [{one: of_all[one] for one in ids if one in of_all} for of_all in (names, uris)]
            yield export_task.remote(export, path, *known)

    upcoming = tasks()
    exporting = finished_tasks(lambda: next(upcoming, None), layout.workers, "the export of masks")
    with contextlib.closing(exporting) as finished:
        for _, files in finished:
            result.exported += files
    result.seconds["export"] = time.monotonic() - began


class SetImages:
    """What tasks need to know of the images of sets, made when a task needs it."""

    def __init__(self, images: pa.Table, pending: list[PendingSet], config: Config) -> None:
        self._images = images.select([name for name in images.column_names if name != "embedding"])
        # where the bytes of each image are; rows of nulls where that is not known
        self._sources: pa.Table | None = None
        if pending and (config.cosegment.refine or config.cosegment.crop_augmentations):
            needed = np.unique(np.concatenate([one.members for one in pending]))
            found = locate(images["uri"].take(pa.array(needed)).to_pylist(), config.storage.options).combine_chunks()
            self._sources = found.take(pc.index_in(images["uri"], value_set=found["uri"]))

    def at(self, positions: np.ndarray, outliers: np.ndarray) -> list[SetImage]:
        """Images at some positions. outliers: positions of those that are unlike the others of their set."""
        rows = self._images.take(pa.array(positions)).to_pylist()
        sources: list[dict[str, Any]] = [{"uri": None}] * len(rows)
        if self._sources is not None:
            sources = self._sources.take(pa.array(positions)).to_pylist()
        inlier = ~np.isin(positions, outliers)
        return [_describe(row, source, bool(one)) for row, source, one in zip(rows, sources, inlier, strict=True)]


def _describe(row: dict[str, Any], source: dict[str, Any], inlier: bool) -> SetImage:
    """row: of images. source: as `locate` found it."""
    if source["uri"] and source["container"] is None:
        # a picture of another size is another picture
        source["source_size"] = row["source_size"]
    elif source["uri"] and source["source_version"] != row["source_version"]:
        source["error"] = f"{source['container']} has changed since it was extracted"
    return SetImage(
        place=ImagePlace(row["image_id"], row["shard"], (row["grid_height"], row["grid_width"])),
        run_id=row["run_id"],
        width=row["width"],
        height=row["height"],
        model_width=row["model_width"],
        model_height=row["model_height"],
        inlier=inlier,
        source=source if source["uri"] else None,
    )


class Commits:
    """Reports that wait for the next commit, and what they add up to."""

    def __init__(self, tables: PartTables, config: Config, result: Result) -> None:
        self._tables = tables
        self._result = result
        self._metrics = JobMetrics("cosegment")
        self._waiting = WaitingReports(config.run.commit_seconds, self._commit, result, self._metrics)

    def take(self, report: SegmentReport) -> None:
        """Count a report; commit when what waits has waited long enough."""
        result = self._result
        result.failed_sets |= report.failed
        result.bytes_read += report.bytes_read
        result.bytes_written += report.bytes_written
        self._waiting.spent(report.seconds)
        self._metrics.read(report.bytes_read)
        if report.images:
            self._waiting.add(report)
            self._waiting.commit_when_due()

    def commit(self) -> None:
        """Commit what waits; an interruption comes after it."""
        self._waiting.commit()

    def _commit(self, reports: list[SegmentReport]) -> None:
        committed = self._tables.commit(reports, self._result.run_id)
        kept = sum(len(report.keys) for report in committed)
        result, changed = self._result, self._tables.changed_meanwhile
        result.segmented += kept
        result.changed_meanwhile += changed
        result.done_elsewhere += sum(len(report.keys) for report in reports) - kept - changed
        result.without_foreground += sum(report.without_foreground for report in committed)
        result.noted += sum(report.noted for report in committed)
        self._metrics.committed(kept, sum(report.bytes_written for report in reports))


def _about_failed(result: Result) -> str:
    shown = [f"{set_id}: {why}" for set_id, why in list(result.failed_sets.items())[:MOST_FAILED_SHOWN]]
    more = f"; and {len(result.failed_sets) - MOST_FAILED_SHOWN:,} more" if len(result.failed_sets) > len(shown) else ""
    return (
        f"{len(result.failed_sets):,} of {counted(result.sets, 'set')} could not be fitted ({'; '.join(shown)}{more}); "
        "the others are done."
    )
