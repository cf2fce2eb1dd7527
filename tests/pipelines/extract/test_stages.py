"""The stages and their layout, called as Ray calls them but without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_runs import settings
from stores import assert_same

from dino_ops.errors import ModelError
from pipelines import sources
from pipelines.errors import JobError, RequestError
from pipelines.extract import stages
from pipelines.extract.layout import ModelFacts, model_facts
from pipelines.extract.layout import plan_extraction as plan_workers
from pipelines.extract.stages import FusedWorker, ModelWorker, WriteWorker, decode_block
from pipelines.features.extractor import ExtractorSetup
from pipelines.settings.sections import Config
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.store import Store

RANDOM = "random:0"


def setup_of(store: Path, config: Config) -> ExtractorSetup:
    Store.create(str(store), config)
    return ExtractorSetup(str(store), "r1", config, "cpu", RANDOM, threads=1, progress_seconds=0)


def listed(folder: Path) -> pa.Table:
    table = sources.list_images(str(folder)).table
    return table.append_column("position", pa.array(range(len(table)), pa.int64()))


def reports_of(worker: Callable[[pa.Table], Any], block: pa.Table) -> list[ShardReport]:
    made = worker(block)
    tables: Iterator[pa.Table] = iter([made]) if isinstance(made, pa.Table) else made
    return [ShardReport.from_json(text) for table in tables for text in table["report"].to_pylist()]


def committed(store: Path, config: Config, reports: list[ShardReport], rows: pa.Table) -> Path:
    opened = Store.open(str(store), config)
    versions = {row["image_id"]: (row["source_size"], row["source_version"]) for row in rows.to_pylist()}
    Committer(opened, "r1", set()).commit(reports, versions)
    return store


def test_fused_and_separate_stages_write_the_same(photos: Callable[..., Path], tmp_path: Path) -> None:
    folder, config = photos(11), settings()
    (folder / "cat" / "broken.jpg").write_bytes(b"no image")
    rows = listed(folder)
    fused_setup, separate_setup = setup_of(tmp_path / "fused", config), setup_of(tmp_path / "separate", config)
    fused = reports_of(FusedWorker(fused_setup), rows)
    pixels = decode_block(rows, separate_setup, 16)
    separate = reports_of(WriteWorker(separate_setup), ModelWorker(separate_setup)(pixels))
    for reports in (fused, separate):
        assert sum(report.done for report in reports) == 11 and sum(report.failed for report in reports) == 1
        spent: dict[str, float] = {}
        for report in reports:
            spent |= report.seconds
        assert {"fetch", "decode", "model", "write"} <= spent.keys()
    assert_same(
        committed(tmp_path / "separate", config, separate, rows), committed(tmp_path / "fused", config, fused, rows)
    )


def test_a_block_of_which_nothing_is_readable_writes_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"no image")
    setup = setup_of(tmp_path / "store", settings())
    fused = reports_of(FusedWorker(setup), listed(folder))
    separate = reports_of(WriteWorker(setup), ModelWorker(setup)(decode_block(listed(folder), setup, 16)))
    for reports in (fused, separate):
        assert {(report.kind, report.images) for report in reports} == {("progress", None)}
        assert sum(len(report.failures) for report in reports) == 1
    assert not list(tmp_path.rglob("*.parquet"))


def test_one_image_that_the_model_refuses_takes_no_other_with_it(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = FusedWorker(setup_of(tmp_path / "store", settings()))
    rows = listed(photos(6))
    extract, poisoned = worker.extractor.extract, []

    def refusing(prepared: list[Any]) -> list[Any]:
        if not poisoned:
            poisoned.append(prepared[2].pixels)
        if any(np.array_equal(one.pixels, poisoned[0]) for one in prepared):
            raise RuntimeError("not this one")
        return extract(prepared)

    monkeypatch.setattr(worker.extractor, "extract", refusing)
    reports = reports_of(worker, rows)
    failures = [failure for report in reports for failure in report.failures]
    assert [(one["stage"], one["error"], one["message"]) for one in failures] == [
        ("extract", "RuntimeError", "not this one")
    ]
    done = [image_id for report in reports for image_id in report.image_ids]
    assert len(done) == 5 and failures[0]["image_id"] not in done


def test_slow_models_take_few_images_at_a_time(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that progress shows, and what is done can be committed in time."""
    worker = FusedWorker(setup_of(tmp_path / "store", settings()))
    rows = listed(photos(60))
    sizes = []
    decode = worker._decode
    monkeypatch.setattr(worker, "_decode", lambda chunk: sizes.append(len(chunk)) or decode(chunk))
    reports_of(worker, rows)
    assert sum(sizes) == 60 and sizes[0] == stages.FIRST_CHUNK_IMAGES and max(sizes) == stages.MOST_CHUNK_IMAGES
    sizes.clear()
    monkeypatch.setattr(stages, "CHUNK_MODEL_SECONDS", 0.0)
    worker.chunk = stages.FIRST_CHUNK_IMAGES
    reports_of(worker, rows)
    assert sum(sizes) == 60 and set(sizes[2:]) == {1}


def test_files_are_held_a_few_at_a_time(photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By their bytes; one that has more than all may have is held alone, and those inside Parquet are reckoned."""
    rows = listed(photos(6))
    sizes = pa.array([40, 50, 20, 300, 90, 10], pa.int64())
    rows = rows.set_column(rows.schema.get_field_index("source_size"), "source_size", sizes)
    monkeypatch.setattr(stages, "MOST_FETCHED_BYTES", 100)
    assert [len(few) for few in stages._by_bytes(rows)] == [2, 1, 1, 2]
    assert pa.concat_tables(list(stages._by_bytes(rows))).equals(rows)
    assert list(stages._by_bytes(rows.slice(0, 0))) == []
    inside = rows.set_column(rows.schema.get_field_index("row_group"), "row_group", pa.array([0] * 6, pa.int32()))
    monkeypatch.setattr(stages, "MOST_FETCHED_BYTES", 4 * stages.ASSUMED_BYTES_OF_IMAGE_IN_PARQUET)
    assert [len(few) for few in stages._by_bytes(inside)] == [4, 2]


def test_other_weights_than_the_stores_are_refused(photos: Callable[..., Path], tmp_path: Path) -> None:
    """A node of the cluster may have another file under the same name."""
    file = tmp_path / "weights.pth"
    file.write_bytes(b"whatever it holds")
    config = settings(f"model.weights={file}")
    with pytest.raises(JobError, match=r"on this worker .* differ from those"):
        FusedWorker(ExtractorSetup(str(tmp_path), "r1", config, "cpu", "sha256:0123", threads=1))


def test_a_device_that_is_not_there_is_refused_on_the_worker(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match="sees 0 GPUs"):
        FusedWorker(ExtractorSetup(str(tmp_path), "r1", settings(), "cuda", RANDOM, threads=1))


FACTS = ModelFacts(patch_size=16, dims={"descriptor": 384}, patches=252, depth=12, width=384)


@pytest.mark.parametrize(
    ("resources", "overrides", "images", "workers", "cpus", "gpus"),
    [
        ({"CPU": 2}, [], 960, 2, 1.0, 0.0),  # one thread each scales best
        ({"CPU": 2}, [], 3, 1, 2.0, 0.0),  # a second worker would start longer than it works
        ({"CPU": 64}, [], 100_000, 16, 4.0, 0.0),
        ({"CPU": 64}, ["run.workers=2"], 100_000, 2, 32.0, 0.0),
        ({"CPU": 16, "GPU": 1}, [], 100_000, 1, 1.0, 1.0),
        ({"CPU": 64, "GPU": 8}, [], 100_000, 8, 1.0, 1.0),
        ({"CPU": 64, "GPU": 8}, ["run.gpus_per_worker=0.5"], 100_000, 16, 1.0, 0.5),
        ({"CPU": 16, "GPU": 1}, ["model.device=cpu"], 100_000, 4, 4.0, 0.0),
    ],
)
def test_layouts(
    resources: dict[str, float], overrides: list[str], images: int, workers: int, cpus: float, gpus: float
) -> None:
    from pipelines.settings.loading import load_config

    layout = plan_workers(resources, load_config([], overrides), FACTS, images)
    assert (layout.workers, layout.cpus, layout.gpus) == (workers, cpus, gpus)
    assert layout.separate == (gpus > 0)
    left = resources["CPU"] - layout.workers * layout.cpus
    assert left >= (layout.decode_cpus if layout.separate else 0), "Ray waits for ever when a stage has no CPU"


def test_blocks_make_files_of_a_good_size_and_leave_nobody_idle() -> None:
    from pipelines.settings.loading import load_config

    many = plan_workers({"CPU": 16, "GPU": 1}, load_config(), FACTS, 10_000_000)
    stored = many.block_size * FACTS.patches * 384 * 1.91
    assert 128e6 < stored < 512e6
    few = plan_workers({"CPU": 64}, load_config(), FACTS, 640)
    assert few.block_size * few.workers <= 640 + few.block_size
    assert plan_workers({"CPU": 4}, load_config(overrides=["run.images_per_shard=7"]), FACTS, 640).block_size == 7


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(RequestError, match="no GPU"):
        plan_workers({"CPU": 4}, settings("model.device=cuda"), FACTS, 10)
    with pytest.raises(RequestError, match="3 workers"):
        plan_workers({"CPU": 16, "GPU": 2}, settings("run.workers=3"), FACTS, 10)


def test_facts_of_a_model_come_from_the_model() -> None:
    facts = model_facts(settings("image.shorter_side=224", "features.extra=[{layer: 9}]"))
    assert facts.patch_size == 16 and facts.dims == {"descriptor": 192, "descriptor_key9": 192}
    assert facts.patches == 14 * 18
    assert 2.5 < facts.gflop < 3.6  # 2.5 for a square image
