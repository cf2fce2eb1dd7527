"""evaluate knn and linear: on hand-made embeddings, across two stores, and requests that cannot be met."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hand_made import features, source
from sklearn.neighbors import KNeighborsClassifier
from small_runs import settings
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.extract.shards import ShardWriter
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.store import Store

DIMENSION = 6
LABELS = ("ant", "bee", "cat")


def make_store(folder: Path, count: int, seed: int, *overrides: str, labels: tuple[str | None, ...] = LABELS) -> str:
    """Images whose embeddings lie around a centre for each label, overlapping."""
    store = Store.create(str(folder), settings(*overrides))
    centres = np.random.default_rng(0).standard_normal((len(labels), DIMENSION))
    generator = np.random.default_rng(seed)
    writer = ShardWriter(store.uri, store.config, "20200101T000000Z-000001")
    for at in range(count):
        label = at % len(labels)
        embedding = centres[label] + 0.8 * generator.standard_normal(DIMENSION)
        made = dataclasses.replace(features(), embedding=embedding.astype(np.float32))
        writer.add({**source(f"{at:03d}.jpg", at), "label": labels[label]}, made)
    patches, rows = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, rows)
    Committer(store, writer.run_id, set()).commit([report], dict.fromkeys(writer.image_ids, (10, "v1")))
    return store.uri


def evaluate(task: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", task, *arguments])


def as_json(task: str, *arguments: str) -> dict[str, object]:
    result = evaluate(task, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def sentence(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("dinoray: ")


def embeddings_of(store: str) -> tuple[np.ndarray, list[str]]:
    rows = Store.open(store, settings()).images.read(["image_id", "label", "embedding"]).sort_by("image_id")
    vectors = np.stack(rows["embedding"].to_numpy())
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rows["label"].to_pylist()


def test_knn_is_that_of_scikit_learn(tmp_path: Path) -> None:
    train, test = make_store(tmp_path / "train", 90, 1), make_store(tmp_path / "test", 45, 2)
    found = as_json("knn", train, "--test", test, "--set", "evaluate.neighbours=[5,20]")
    (vectors, labels), (queries, truth) = embeddings_of(train), embeddings_of(test)
    expected = {}
    for k in (5, 20):
        model = KNeighborsClassifier(
            k, metric="euclidean", weights=lambda distances: np.exp((1 - distances**2 / 2) / 0.07)
        )
        expected[str(k)] = pytest.approx(model.fit(vectors, labels).score(queries, truth), abs=1e-6)
    assert found["accuracy"] == expected
    assert (found["learnt_from"], found["tested"], found["labels"], found["unknown"]) == (90, 45, 3, 0)
    assert found["chance"] == pytest.approx(1 / 3, abs=1e-6)
    assert (Path(train) / "runs" / f"{found['run_id']}.json").exists()


@pytest.mark.slow
def test_without_a_test_store_images_are_told_apart_by_the_others(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 90, 1)
    vectors, labels = embeddings_of(store)
    right = 0
    for at in range(90):
        cosine = vectors @ vectors[at]
        cosine[at] = -np.inf
        right += labels[int(cosine.argmax())] == labels[at]
    found = as_json("knn", store, "--set", "evaluate.neighbours=[1]")
    assert found["accuracy"] == {"1": pytest.approx(right / 90, abs=1e-6)}
    linear = as_json("linear", store)
    assert isinstance(linear["accuracy"], dict) and 0.6 < linear["accuracy"]["linear"] < 1
    assert isinstance(linear["rates"], list) and len(linear["rates"]) == 5


def test_linear_across_stores_and_labels_nobody_knows(tmp_path: Path) -> None:
    train = make_store(tmp_path / "train", 90, 1)
    test = make_store(tmp_path / "test", 40, 2, labels=("ant", "bee", "cat", "dog"))
    found = as_json("linear", train, "--test", test)
    assert found["unknown"] == 10 and isinstance(found["accuracy"], dict) and found["accuracy"]["linear"] <= 0.75
    assert found == {**as_json("linear", train, "--test", test), "run_id": found["run_id"], "seconds": found["seconds"]}
    printed = evaluate("linear", train, "--test", test).stdout
    assert (
        "top-1 accuracy of 40 images, learnt from 90" in printed
        and "10 of a label that no image to learn from has" in printed
    )


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 12, 1)
    other = make_store(tmp_path / "other", 12, 1, "features.layer=9")
    assert "were made with different specs" in sentence(evaluate("knn", store, "--test", other))
    bare = make_store(tmp_path / "bare", 6, 1, labels=(None,))
    assert "No image of" in sentence(evaluate("linear", bare))
    one = make_store(tmp_path / "one", 6, 1, labels=("ant",))
    assert "have the same label (ant)" in sentence(evaluate("knn", one))
    assert "There is no store" in sentence(evaluate("knn", store, "--test", str(tmp_path / "nowhere")))
    without = Store.create(str(tmp_path / "without"), settings("features.embedding=false")).uri
    assert "has no embeddings" in sentence(evaluate("knn", without))
