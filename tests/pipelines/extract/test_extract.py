"""extract, on a local Ray where that matters: files to tables, the life of a store; judged by other readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hand_made import finished_store
from PIL import Image, ImageDraw
from small_runs import as_options, photo, settings
from stores import descriptors, sound

from dino_ops import Extractor
from pipelines.errors import JobError
from pipelines.extract import job as extract
from pipelines.extract import streaming
from pipelines.extract.job import Result
from pipelines.upkeep import stats


def run(source: Path, store: Path, *overrides: str, **arguments: object) -> Result:
    return extract.run(settings(*overrides), input=str(source), store=str(store), **arguments)  # type: ignore[arg-type]


@pytest.mark.usefixtures("ray")
def test_the_life_of_a_store(photos: Callable[..., Path], tmp_path: Path) -> None:
    source, store = photos(12), tmp_path / "store"
    broken = source / "dog" / "broken.jpg"
    broken.write_bytes(b"this is not an image")
    (source / "notes.txt").write_text("skipped")

    first = run(source, store, "run.images_per_shard=5")
    assert (first.listed, first.skipped, first.extracted, first.failed, first.exit_code) == (13, 1, 12, 1, 0)
    assert first.failures_by_reason == {"decode: ImageError": 1}
    checked = sound(store)
    assert (checked.images, checked.failures) == (12, 1)
    before = descriptors(store)

    again = run(source, store)
    assert (again.already_done, again.failed_before, again.pending, again.exit_code) == (12, 1, 0, 0)

    retried = run(source, store, retry_failed=True, dry_run=True)
    assert (retried.pending, retried.already_done) == (1, 12)

    changed = source / "cat" / "0001.jpg"
    photo(99, 120, 72).save(changed)
    third = run(source, store, "run.stages=separate")
    assert (third.pending, third.changed, third.extracted, third.already_done) == (1, 1, 1, 11)
    sound(store)
    after = descriptors(store)
    assert len(after["cat/0001.jpg"]) > len(before["cat/0001.jpg"]), "the new photo is wider"
    for image_id in before.keys() - {"cat/0001.jpg"}:
        np.testing.assert_array_equal(before[image_id], after[image_id])

    (source / "cat" / "0003.jpg").unlink()
    assert run(source, store).pruned == 0, "rows stay until --prune"
    assert run(source, store, prune=True).pruned == 1
    assert sound(store).images == 11 and "cat/0003.jpg" not in descriptors(store)

    photo(7).save(broken)
    mended = run(source, store)
    assert (mended.pending, mended.extracted) == (1, 1), "a failed file that changed is tried without being asked"
    assert (sound(store).images, sound(store).failures) == (12, 0)

    counted = stats.run(settings(), store=str(store))
    assert (counted.images, counted.failures, counted.labels, len(counted.runs)) == (12, 0, 2, 6)
    report = json.loads((store / "runs" / f"{first.run_id}.json").read_text())
    assert report["status"] == "done" and report["result"]["extracted"] == 12
    assert {"list", "fetch", "decode", "model", "write", "commit", "total"} <= report["result"]["seconds"].keys()
    assert report["result"]["bytes_read"] > 0 and report["result"]["bytes_written"] > 0


@pytest.mark.usefixtures("ray")
def test_tables_hold_what_the_extractor_computes(photos: Callable[..., Path], tmp_path: Path) -> None:
    """Through files, Ray and Parquet nothing changes; extra columns come from the same pass."""
    source, store = photos(5), tmp_path / "store"
    overrides = ("store.dtype=float32", "features.stride=8", "features.extra=[{layer: 9, facet: token}]")
    run(source, store, *overrides)
    extractor = Extractor(
        "vit_tiny_patch16_224", "random", stride=8, shorter_side=64, extra=[(9, "token")], device="cpu"
    )
    images = {row["image_id"]: row for row in DeltaTable(store / "images").to_pyarrow_table().to_pylist()}
    patches = DeltaTable(store / "patches").to_pyarrow_table()
    stored, extra = descriptors(store), descriptors(store, "descriptor_token9")
    for image_id, row in images.items():
        expected = extractor(source / image_id)
        grid = (row["grid_height"], row["grid_width"])
        assert grid == expected.y.shape and (row["width"], row["height"]) == (expected.width, expected.height)
        assert (row["model_width"], row["model_height"]) == (expected.model_width, expected.model_height)
        np.testing.assert_allclose(stored[image_id], expected.descriptor.reshape(-1, 192), atol=2e-5)
        np.testing.assert_allclose(extra[image_id], expected.extra["token9"].reshape(-1, 192), atol=2e-5)
        np.testing.assert_allclose(row["embedding"], expected.embedding, atol=2e-5)
        own = patches.filter(np.array(patches["image_id"].to_pylist()) == image_id)
        np.testing.assert_allclose(own["y"].to_numpy().reshape(grid), expected.y)
        np.testing.assert_allclose(own["x"].to_numpy().reshape(grid), expected.x)
        np.testing.assert_allclose(own["saliency"].to_numpy().reshape(grid), expected.saliency, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "most_bytes"),
    [pytest.param("float16", 1e-3, 2.5, marks=pytest.mark.slow), ("int8", 8e-3, 1.02)],
)
@pytest.mark.usefixtures("extract_here")
def test_smaller_dtypes_stay_close_and_small(
    photos: Callable[..., Path], tmp_path: Path, dtype: str, tolerance: float, most_bytes: float
) -> None:
    source = photos(3)
    run(source, tmp_path / "exact", "store.dtype=float32")
    run(source, tmp_path / "small", f"store.dtype={dtype}", "run.stages=separate")
    exact, small = descriptors(tmp_path / "exact"), descriptors(tmp_path / "small")
    for image_id, vectors in exact.items():
        assert np.abs(small[image_id] - vectors).max() <= tolerance * np.abs(vectors).max()
    for file in (tmp_path / "small" / "patches").glob("*.parquet"):
        group = pq.ParquetFile(file).metadata.row_group(0)
        columns = [group.column(number) for number in range(group.num_columns)]
        (values,) = (column for column in columns if column.path_in_schema == "descriptor.list.element")
        assert values.total_compressed_size <= most_bytes * values.num_values
    assert sound(tmp_path / "small").images == 3


@pytest.mark.usefixtures("extract_here")
def test_pca_and_thinning(photos: Callable[..., Path], tmp_path: Path) -> None:
    source, store = photos(6), tmp_path / "store"
    run(source, store, "store.pca=8", "store.dtype=float32", "store.every=2")
    run(source, tmp_path / "full", "store.dtype=float32")
    full, small = descriptors(tmp_path / "full"), descriptors(store)
    sound(store)
    fitted = pq.read_table(store / "projection" / "projection.parquet").to_pylist()
    mean = np.array(next(row["vector"] for row in fitted if row["component"] == -1))
    components = np.array([row["vector"] for row in fitted if row["component"] >= 0])
    assert components.shape == (8, 192)
    np.testing.assert_allclose(components @ components.T, np.eye(8), atol=1e-8)
    # an independent fit on the same patches spans the same space
    rows = np.concatenate(list(full.values())).astype(np.float64)
    top = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:8]
    np.testing.assert_allclose(np.linalg.svd(top @ components.T)[1], 1, atol=1e-4)
    for image_id, vectors in small.items():
        np.testing.assert_allclose(vectors, (full[image_id][::2] - mean) @ components.T, atol=1e-4)
    photo(50).save(source / "new.png")
    assert run(source, store, "store.pca=8", "store.dtype=float32", "store.every=2").extracted == 1
    assert sound(store).images == 7


@pytest.mark.usefixtures("extract_here")
def test_only_salient_patches_or_none(photos: Callable[..., Path], tmp_path: Path) -> None:
    source = photos(3)
    run(source, tmp_path / "salient", "store.patches=salient", "store.salient_threshold=0.5")
    sound(tmp_path / "salient")
    saliency = DeltaTable(tmp_path / "salient" / "patches").to_pyarrow_table()["saliency"].to_numpy()
    assert len(saliency) and saliency.min() > 0.5
    result = run(source, tmp_path / "none", "store.patches=none")
    assert result.extracted == 3 and sound(tmp_path / "none").patches == 0
    assert DeltaTable(tmp_path / "none" / "images").to_pyarrow_table()["shard"].null_count == 3


@pytest.mark.usefixtures("extract_here")
def test_coordinates_point_into_the_original_photo(tmp_path: Path) -> None:
    """A square drawn at a known place changes most the patch whose centre lies in it."""
    source, places = tmp_path / "in", {"plain": None, "a": (200, 40), "b": (40, 120), "c": (300, 150)}
    source.mkdir()
    for name, place in places.items():
        image = Image.new("RGB", (360, 180), (90, 120, 90))
        if place:
            x, y = place
            ImageDraw.Draw(image).rectangle((x - 10, y - 10, x + 10, y + 10), fill=(255, 0, 0))
        image.save(source / f"{name}.png")
    run(source, tmp_path / "store", "image.shorter_side=128", "features.layer=0", "features.facet=token")
    table = DeltaTable(tmp_path / "store" / "patches").to_pandas()
    vectors = {key: np.stack(rows["descriptor"]) for key, rows in table.groupby("image_id")}
    for name, place in places.items():
        if place is None:
            continue
        rows = table[table["image_id"] == f"{name}.png"].reset_index(drop=True)
        changed = np.linalg.norm(vectors[f"{name}.png"] - vectors["plain.png"], axis=1).argmax()
        assert (
            abs(rows["x"][changed] - place[0]) <= 22.5 / 2 + 10 and abs(rows["y"][changed] - place[1]) <= 22.5 / 2 + 10
        )


@pytest.mark.usefixtures("extract_here")
def test_anyone_can_read_the_tables(photos: Callable[..., Path], tmp_path: Path) -> None:
    """Without importing dinoray: a subprocess with DuckDB, Polars, pandas and pyarrow alone."""
    source, store = photos(6), tmp_path / "store"
    run(source, store)
    program = f"""
import duckdb, polars, pandas, pyarrow.parquet, pyarrow.dataset, glob, sys
patches = glob.glob({str(store)!r} + "/patches/*.parquet")
images = glob.glob({str(store)!r} + "/images/*.parquet")
assert duckdb.sql(f"select typeof(descriptor) from read_parquet({{patches}}) limit 1").fetchall() == [("FLOAT[]",)]
assert duckdb.sql(f"select count(*) from read_parquet({{images}})").fetchall() == [(6,)]
near = duckdb.sql(f'''select array_cosine_similarity(a.embedding::FLOAT[192], a.embedding::FLOAT[192])
                      from read_parquet({{images}}) a limit 1''').fetchall()
assert abs(near[0][0] - 1) < 1e-5
assert polars.read_parquet(patches).schema["descriptor"] == polars.List(polars.Float32)
assert polars.scan_delta({str(store)!r} + "/patches").select(polars.len()).collect().item() > 0
frame = pandas.read_parquet(patches[0])
assert len(frame["descriptor"][0]) == 192 and frame["descriptor"][0].dtype == "float32"
column = pyarrow.parquet.read_table(patches[0])["descriptor"]
assert pyarrow.types.is_list(column.type) and column.type.value_type == pyarrow.float32()
assert not [name for name in sys.modules if name.split(".")[0] in ("pipelines", "dino_ops", "ray", "torch")]
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


@pytest.mark.usefixtures("extract_here")
def test_a_lookup_of_one_image_reads_one_row_group(photos: Callable[..., Path], tmp_path: Path) -> None:
    source, store = photos(150), tmp_path / "store"
    run(source, store, "run.images_per_shard=150", "run.commit_seconds=600", "image.shorter_side=32")
    (file,) = (store / "patches").glob("*.parquet")
    footer = pq.ParquetFile(file).metadata
    ranges = []
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        columns = {group.column(number).path_in_schema: group.column(number) for number in range(group.num_columns)}
        ranges.append((columns["image_id"].statistics.min, columns["image_id"].statistics.max))
        descriptor = columns["descriptor.list.element"]
        assert "BYTE_STREAM_SPLIT" in descriptor.encodings and descriptor.compression == "ZSTD"
        assert descriptor.dictionary_page_offset is None
    assert len(ranges) == 3
    for image_id in DeltaTable(store / "images").to_pyarrow_table()["image_id"].to_pylist():
        assert sum(low <= image_id <= high for low, high in ranges) == 1
    found = duckdb.sql(f"select count(*) from read_parquet('{file}') where image_id = 'cat/0001.jpg'").fetchall()
    assert found == [(4,)]
    assert pl.read_parquet(file).height == footer.num_rows


@pytest.mark.usefixtures("ray")
def test_awkward_files_end_as_a_row_each(data: Path, tmp_path: Path) -> None:
    result = run(data / "awkward", tmp_path / "store", "run.workers=2")
    assert result.exit_code == 0
    checked = sound(tmp_path / "store")
    assert checked.images + checked.failures == result.listed > 250
    messages = DeltaTable(tmp_path / "store" / "failures").to_pyarrow_table().to_pylist()
    assert all(row["stage"] == "decode" and len(row["message"]) > 10 for row in messages)
    vectors = descriptors(tmp_path / "store")
    for shape in ("Landscape", "Portrait"):
        upright = vectors[f"exif-orientation/{shape}_1.jpg"]
        for orientation in range(2, 9):
            turned = vectors[f"exif-orientation/{shape}_{orientation}.jpg"]
            assert turned.shape == upright.shape
            similarity = (turned * upright).sum(1) / np.linalg.norm(turned, axis=1) / np.linalg.norm(upright, axis=1)
            assert similarity.min() > 0.95


def test_a_second_run_over_1000_images_is_quick_and_starts_nothing(photos: Callable[..., Path], tmp_path: Path) -> None:
    source, store = photos(1000), tmp_path / "store"
    finished_store(source, store, settings("image.shorter_side=16"))
    program = f"""
import sys
from pipelines.cli import app
app(["extract", {str(source)!r}, {str(store)!r}, *{as_options("image.shorter_side=16")!r}], standalone_mode=False)
assert not [name for name in sys.modules if name in ("ray", "torch", "timm")]
"""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True)
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("extract_here")
def test_limit_and_dry_run(photos: Callable[..., Path], tmp_path: Path) -> None:
    source, store = photos(6), tmp_path / "store"
    planned = run(source, store, dry_run=True)
    assert (planned.pending, planned.status) == (6, "dry_run") and not store.exists()
    assert run(source, store, limit=4).extracted == 4
    assert run(source, store, dry_run=True).pending == 2
    assert run(source, store).extracted == 2
    sound(store)


DEADLY = "dog/0006.jpg"


def deadly_worker(stage: str) -> tuple[str, object]:
    """A stage that dies of one image as a crash in native code would kill it; its name, and what replaces it."""
    import pipelines.extract.stages

    class Fused(pipelines.extract.stages.FusedWorker):
        def process(self, block):  # type: ignore[no-untyped-def]
            if DEADLY in block["image_id"].to_pylist():
                os._exit(1)
            return super().process(block)

    class Model(pipelines.extract.stages.ModelWorker):
        def __call__(self, block):  # type: ignore[no-untyped-def]
            if DEADLY in [source["image_id"] for source in pipelines.extract.stages.unpack(block).sources]:
                os._exit(1)
            return super().__call__(block)

    def decode(block, setup, patch_size):  # type: ignore[no-untyped-def]
        if DEADLY in block["image_id"].to_pylist():
            os._exit(1)
        return pipelines.extract.stages.decode_block(block, setup, patch_size)

    return {"fused": ("FusedWorker", Fused), "model": ("ModelWorker", Model), "decode": ("decode_block", decode)}[stage]


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("stage", ["fused", "model", "decode"])
def test_an_image_that_kills_its_worker_is_recorded_and_its_neighbours_are_not_lost(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A worker that dies on one image: bounded attempts, one failure, everything else extracted."""
    name, deadly = deadly_worker(stage)
    monkeypatch.setattr(f"pipelines.extract.streaming.{name}", deadly)
    store = tmp_path / "store"
    stages = "fused" if stage == "fused" else "separate"
    # small blocks, so that others wait for the worker when it dies
    result = run(photos(20), store, "run.images_per_shard=5", f"run.stages={stages}")
    assert (result.extracted, result.failed, result.exit_code) == (19, 1, 0)
    (row,) = DeltaTable(store / "failures").to_pyarrow_table().to_pylist()
    assert (row["image_id"], row["error"], row["attempts"]) == (DEADLY, "WorkerDied", 3)
    sound(store)


@pytest.mark.usefixtures("ray")
def test_a_failing_write_is_tried_again(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.extract.stages

    marker = tmp_path / "failed once"

    class Writer(pipelines.extract.stages.ShardWriter):
        def close(self):  # type: ignore[no-untyped-def]
            if not marker.exists():
                marker.touch()
                raise OSError(5, "Input/output error")
            return super().close()

    class Unlucky(pipelines.extract.stages.FusedWorker):
        def _new_writer(self):  # type: ignore[no-untyped-def]
            return Writer(self.setup.store, self.setup.config, self.setup.run_id, self.projections)

    monkeypatch.setattr("pipelines.extract.streaming.FusedWorker", Unlucky)
    store = tmp_path / "store"
    result = run(photos(8), store)
    assert marker.exists() and (result.extracted, result.failed) == (8, 0)
    assert sound(store).unreferenced_files == 0, "what the failed write began is removed"


@pytest.mark.usefixtures("ray")
def test_a_run_that_fails_ends_its_work_before_ray_ends(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data that is told to stop after Ray has gone starts another Ray, and hangs."""
    order: list[str] = []
    stream_reports, ray_session = streaming.stream_reports, extract.ray_session

    def stream(*given: Any, **named: Any) -> Iterator[Any]:
        try:
            yield from stream_reports(*given, **named)
        finally:
            order.append("the work ends")

    @contextmanager
    def session(*given: Any) -> Iterator[Any]:
        with ray_session(*given) as resources:
            try:
                yield resources
            finally:
                order.append("Ray ends")

    def fail(*given: Any) -> None:
        raise JobError("the storage is gone")

    monkeypatch.setattr(streaming, "stream_reports", stream)
    monkeypatch.setattr(extract, "ray_session", session)
    monkeypatch.setattr(extract.PendingWork, "take", fail)
    with pytest.raises(JobError, match="the storage is gone"):
        run(photos(4), tmp_path / "store")
    assert order == ["the work ends", *["Ray ends"] * 2], "the session of the extraction is within that of the run"
