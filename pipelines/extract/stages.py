"""What runs on workers: fetch and decode, the model, and the shard writer.

Each stage is what `map_batches` accepts, a function or a class called with a block, and works without Ray in tests.
A block is a shard: listing rows with `position`, in key order. On CPUs one actor does all three in turn, since handing
images between processes costs more than it saves (`FusedWorker`); with GPUs the three run apart, so that decoding and
writing scale on their own (`decode_block`, `ModelWorker`, `WriteWorker`).
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dino_ops.errors import ImageError
from dino_ops.images import PreparedImage, prepare_image
from pipelines.extract.shards import ShardWriter
from pipelines.features.extractor import ExtractorSetup, make_extractor
from pipelines.features.image_spec import image_spec
from pipelines.running.metrics import BusyDevice
from pipelines.sources import fetch
from pipelines.storage.errors import failed_storage, said
from pipelines.store.extraction import ShardReport
from pipelines.store.failures import STORAGE_ERROR, failure_row
from pipelines.store.projection import read_projections

# A chunk is decoded ahead: enough images to fill batches, few enough to hold.
FIRST_CHUNK_IMAGES, MOST_CHUNK_IMAGES = 4, 16
MOST_FETCHED_BYTES = 256 * 2**20
# Of images inside a Parquet file only the whole file's size is known.
ASSUMED_BYTES_OF_IMAGE_IN_PARQUET = 4 * 2**20
# Slow models take few images at a time, so that progress shows and commits are due.
CHUNK_MODEL_SECONDS = 3.0
# One thread of a worker has the model, the other packs or unpacks.
THREADS_PER_MODEL_WORKER = 2
SHARD_SHARE_OF_COMMIT_SECONDS = 0.6


@dataclass
class Decoded:
    """A chunk of a block after fetching and decoding: what the model can take, and what failed.

    sources: listing rows with `position`, of the images in `prepared`. failures: FAILURES columns and `position`.
    """

    sources: list[dict[str, Any]]
    prepared: list[PreparedImage]
    failures: list[dict[str, Any]]
    fetch_seconds: float = 0.0
    decode_seconds: float = 0.0
    bytes_read: int = 0


def fetch_and_decode(rows: pa.Table, setup: ExtractorSetup, patch_size: int) -> Decoded:
    """Fetch the bytes of listing rows and decode them; every row ends in `prepared` or in `failures`.

    Files are held a few at a time, at most MOST_FETCHED_BYTES of them or one larger one.
    """
    decoded = Decoded([], [], [])
    for few in _by_bytes(rows):
        _fetch_and_decode_few(few, decoded, setup, patch_size)
    return decoded


def _by_bytes(rows: pa.Table) -> Iterator[pa.Table]:
    """Rows in order, as many at a time as have MOST_FETCHED_BYTES together."""
    begin, held = 0, 0
    sizes, groups = (rows[name].to_pylist() for name in ("source_size", "row_group"))
    for at, (size, group) in enumerate(zip(sizes, groups, strict=True)):
        size = max(size, 0) if group is None else ASSUMED_BYTES_OF_IMAGE_IN_PARQUET
        if held and held + size > MOST_FETCHED_BYTES:
            yield rows.slice(begin, at - begin)
            begin, held = at, 0
        held += size
    if begin < len(rows):
        yield rows.slice(begin)


def _fetch_and_decode_few(rows: pa.Table, decoded: Decoded, setup: ExtractorSetup, patch_size: int) -> None:
    started = time.perf_counter()
    run = setup.config.run
    fetched = fetch(
        rows,
        storage_options=setup.config.storage.options,
        attempts=run.attempts,
        max_bytes=int(run.max_file_mb * 1e6),
    )
    decoded.fetch_seconds += time.perf_counter() - started
    started = time.perf_counter()
    for source, got in zip(rows.to_pylist(), fetched, strict=True):
        if got.error is not None or got.data is None:
            stage = "list" if source.get("error") else "fetch"
            error = got.error or OSError("nothing was read")
            name, message = (STORAGE_ERROR, said(error)) if failed_storage(error) else (error, str(error))
            decoded.failures.append(failure_row(source, stage, name, message, got.attempts, setup.run_id))
            continue
        decoded.bytes_read += len(got.data)
        try:
            prepared = prepare_image(got.data, image_spec(setup.config), patch_size)
        except ImageError as error:
            decoded.failures.append(failure_row(source, "decode", error, str(error), 1, setup.run_id))
            continue
        decoded.sources.append(source)
        decoded.prepared.append(prepared)
    decoded.decode_seconds += time.perf_counter() - started


def extract_each(extractor: Any, decoded: Decoded, run_id: str) -> list[Any]:
    """Features of a chunk; when the whole chunk fails, image by image, so that one cannot take others with it.

    Failed images leave `decoded.sources` and join `decoded.failures`.
    """
    try:
        return extractor.extract(decoded.prepared)
    except Exception:
        features, sources = [], []
    for source, prepared in zip(decoded.sources, decoded.prepared, strict=True):
        try:
            features += extractor.extract([prepared])
            sources.append(source)
        except Exception as error:
            decoded.failures.append(failure_row(source, "extract", error, str(error), 2, run_id))
    decoded.sources = sources
    return features


class ReportTally:
    """Counts between two reports."""

    def __init__(self, device: str) -> None:
        self.report = ShardReport("progress", device=device, seconds={})
        self.since = time.monotonic()

    def count(self, decoded: Decoded, model_seconds: float) -> None:
        report = self.report
        report.failures += decoded.failures
        report.done += len(decoded.sources)
        report.failed += len(decoded.failures)
        report.bytes_read += decoded.bytes_read
        self.spend("fetch", decoded.fetch_seconds)
        self.spend("decode", decoded.decode_seconds)
        self.spend("model", model_seconds)

    def spend(self, stage: str, seconds: float) -> None:
        self.report.seconds[stage] = self.report.seconds.get(stage, 0.0) + seconds

    def take(self) -> ShardReport:
        """The counts so far; counting starts again."""
        taken, self.report = self.report, ShardReport("progress", device=self.report.device, seconds={})
        self.since = time.monotonic()
        return taken


def write_shard(writer: ShardWriter, report: ShardReport) -> ShardReport:
    """Close a shard into `report`; a failed write leaves nothing behind and is reported to the driver."""
    started = time.perf_counter()
    try:
        report.patches, report.images = writer.close()
    except Exception as error:
        return failed_write(writer, report, error)
    report.kind = "shard"
    report.positions = writer.positions
    report.image_ids = writer.image_ids
    report.bytes_written = report.images.size + (report.patches.size if report.patches else 0)
    report.seconds["write"] = report.seconds.get("write", 0.0) + time.perf_counter() - started
    return report


def failed_write(
    writer: ShardWriter, report: ShardReport, error: Exception, sources: list[dict[str, Any]] | None = None
) -> ShardReport:
    """The report of a write that failed, of the images in the writer and of those that were to follow."""
    writer.discard()
    report.kind = "failed"
    report.positions = sorted({*writer.positions, *(source["position"] for source in sources or ())})
    failed = failed_storage(error)
    report.error = {
        "stage": "write",
        "error": STORAGE_ERROR if failed else type(error).__name__,
        "message": said(error) if failed else str(error),
        "errno": getattr(error, "errno", None),
    }
    return report


class FusedWorker:
    """One actor from key to file. While the model runs, the next chunk is fetched and decoded in a thread."""

    def __init__(self, setup: ExtractorSetup) -> None:
        self.setup = setup
        self.extractor = make_extractor(setup)
        self.device = f"{self.extractor.device} {self.extractor.precision}"
        self.busy = BusyDevice()
        self.projections = read_projections(setup.store, setup.config)
        self.ahead = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self.chunk = FIRST_CHUNK_IMAGES

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        try:
            for report in self.process(block):
                yield report.to_table()
        except Exception as error:
            # reported rather than raised, so that the driver knows why these images are still undone
            about = {"stage": "extract", "error": type(error).__name__, "message": str(error), "errno": None}
            yield ShardReport("failed", positions=block["position"].to_pylist(), error=about).to_table()

    def process(self, block: pa.Table) -> Iterator[ShardReport]:
        """Reports of a block: shards as they are written, and progress about every second."""
        setup = self.setup
        shard_seconds = setup.config.run.commit_seconds * SHARD_SHARE_OF_COMMIT_SECONDS
        tally = ReportTally(self.device)
        writer = self._new_writer()
        for decoded in self._decoded_ahead(block):
            started = time.perf_counter()
            features = extract_each(self.extractor, decoded, setup.run_id) if decoded.prepared else []
            model_seconds = time.perf_counter() - started
            self.busy.computed(model_seconds)
            tally.count(decoded, model_seconds)
            self._adapt_chunk(len(features), model_seconds)
            started = time.perf_counter()
            try:
                for source, one in zip(decoded.sources, features, strict=True):
                    writer.add(source, one)
            except Exception as error:
                yield failed_write(writer, tally.take(), error, decoded.sources)
                writer = self._new_writer()
                continue
            tally.spend("write", time.perf_counter() - started)
            if len(writer) and time.monotonic() - writer.opened_at > shard_seconds:
                yield write_shard(writer, tally.take())
                writer = self._new_writer()
            elif time.monotonic() - tally.since > setup.progress_seconds:
                yield tally.take()
        yield write_shard(writer, tally.take()) if len(writer) else tally.take()

    def _new_writer(self) -> ShardWriter:
        return ShardWriter(self.setup.store, self.setup.config, self.setup.run_id, self.projections)

    def _decoded_ahead(self, block: pa.Table) -> Iterator[Decoded]:
        waiting: Future[Decoded] | None = None
        while waiting or len(block):
            following = self._decode(block.slice(0, self.chunk)) if len(block) else None
            block = block.slice(self.chunk)
            if waiting:
                yield waiting.result()
            waiting = following

    def _decode(self, chunk: pa.Table) -> Future[Decoded]:
        return self.ahead.submit(fetch_and_decode, chunk, self.setup, self.extractor.patch_size)

    def _adapt_chunk(self, images: int, model_seconds: float) -> None:
        if images:
            self.chunk = max(1, min(MOST_CHUNK_IMAGES, int(CHUNK_MODEL_SECONDS * images / max(model_seconds, 1e-6))))


def decode_block(block: pa.Table, setup: ExtractorSetup, patch_size: int) -> pa.Table:
    """First of the separate stages: the pixels of a block (uint8, never float)."""
    return pack(fetch_and_decode(block, setup, patch_size))


class ModelWorker:
    """Second of the separate stages, one per GPU: pixels in, features out.

    Called from THREADS_PER_MODEL_WORKER threads at once: one packs or unpacks a block while another has the model.
    """

    def __init__(self, setup: ExtractorSetup) -> None:
        self.setup = setup
        self.extractor = make_extractor(setup)
        self.device = f"{self.extractor.device} {self.extractor.precision}"
        self.busy = BusyDevice()
        self.model_is_free = threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        decoded: Decoded = unpack(block)
        tally = ReportTally(self.device)
        with self.model_is_free:
            started = time.perf_counter()
            features = extract_each(self.extractor, decoded, self.setup.run_id) if decoded.prepared else []
            model_seconds = time.perf_counter() - started
            self.busy.computed(model_seconds)
            tally.count(decoded, model_seconds)
        return pack((decoded.sources, features, tally.take()))


class WriteWorker:
    """Last of the separate stages: features to a shard's files."""

    def __init__(self, setup: ExtractorSetup) -> None:
        self.setup = setup
        self.projections = read_projections(setup.store, setup.config)

    def __call__(self, block: pa.Table) -> pa.Table:
        sources, features, report = unpack(block)
        if not sources:
            return report.to_table()
        writer = ShardWriter(self.setup.store, self.setup.config, self.setup.run_id, self.projections)
        started = time.perf_counter()
        try:
            for source, one in zip(sources, features, strict=True):
                writer.add(source, one)
        except Exception as error:
            return failed_write(writer, report, error, sources).to_table()
        report.seconds["write"] = time.perf_counter() - started
        return write_shard(writer, report).to_table()


def pack(content: Any) -> pa.Table:
    """Python objects as a one-row block, for the way between two stages of ours."""
    return pa.table({"packed": pa.array([pickle.dumps(content, protocol=5)], pa.large_binary())})


def unpack(block: pa.Table) -> Any:
    return pickle.loads(block["packed"][0].as_buffer())
