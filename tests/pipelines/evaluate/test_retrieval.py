"""evaluate retrieval: on hand-made embeddings whose neighbours are known, and requests that cannot be met."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hand_made import features, source
from small_runs import settings
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.evaluate import retrieval
from pipelines.extract.shards import ShardWriter
from pipelines.running.reports import new_run_id
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.store import Store

# image_id -> label and the angle of its embedding in degrees
IMAGES = {
    "a.jpg": ("cat", 0),
    "b.jpg": ("cat", 10),
    "c.jpg": ("dog", 16),
    "d.jpg": ("dog", 90),
    "e.jpg": ("fish", 180),  # alone with its label
    "f.jpg": (None, 11),  # would be nearest to b and c
}


def make_store(folder: Path, images: dict[str, tuple[str | None, int]], *overrides: str) -> Path:
    store = Store.create(str(folder), settings(*overrides))
    run_id = new_run_id()
    for image_id in sorted(images, reverse=True):  # a shard each, so that rows come in another order
        label, angle = images[image_id]
        writer = ShardWriter(store.uri, store.config, run_id)
        made = features()
        radians = np.radians(angle)
        made.embedding = np.array([np.cos(radians), np.sin(radians)], np.float32) * (angle + 1)
        writer.add({**source(image_id), "label": label}, made)
        patches, rows = writer.close()
        report = ShardReport("shard", writer.positions, writer.image_ids, patches, rows)
        Committer(store, run_id, set()).commit([report], {image_id: (10, "v1")})
    return folder


def evaluate(store: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", "retrieval", str(store), *options])


def sentence(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("dinoray: ")


def test_by_hand(tmp_path: Path) -> None:
    """a finds b first; b finds c, then a; c finds b, a, then d; d finds c first."""
    store = make_store(tmp_path / "store", IMAGES)
    result = retrieval.run(settings("evaluate.recall_at=[1, 2, 3]"), store=str(store))
    assert (result.images, result.labels, result.queries) == (6, 3, 4)
    assert (result.unlabelled, result.alone) == (1, 1)
    assert result.recall == {1: 2 / 4, 2: 3 / 4, 3: 1}
    assert result.mean_average_precision == pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4, abs=1e-6)


def test_text_json_and_report_say_the_same(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", IMAGES)
    shown = evaluate(store, "--of", "embeddings")
    assert shown.exit_code == 0, shown.output
    for part in ("recall@1    0.5000", "mAP         0.7083", "1 without label left out, 1 alone"):
        assert part in shown.stdout
    content = json.loads(evaluate(store, "--json").stdout)
    assert content["recall"] == {"1": 0.5, "5": 1.0, "10": 1.0}
    report = json.loads((store / "runs" / f"{content['run_id']}.json").read_text())
    assert (report["command"], report["status"], report["asked"]) == (
        "evaluate retrieval", "done", {"of": "embeddings"},
    )  # fmt: skip
    assert report["result"]["recall"] == content["recall"]


def test_without_labels(tmp_path: Path) -> None:
    unlabelled = make_store(tmp_path / "unlabelled", {"a.jpg": (None, 0), "b.jpg": (None, 1)})
    assert "No image of" in sentence(evaluate(unlabelled))
    empty = make_store(tmp_path / "empty", {})
    assert "has no images" in sentence(evaluate(empty))
    alone = make_store(tmp_path / "alone", {"a.jpg": ("a", 0), "b.jpg": ("b", 1), "c.jpg": (None, 1)})
    assert "No two images" in sentence(evaluate(alone))
    assert not (alone / "runs").exists()


def test_without_embeddings(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", {}, "features.embedding=false")
    assert "has no embeddings" in sentence(evaluate(store))


def test_other_vectors_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", IMAGES)
    assert "--of is 'patches', but it should be embeddings" in sentence(evaluate(store, "--of", "patches"))
