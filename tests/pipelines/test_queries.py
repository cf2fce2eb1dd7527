"""The ten questions of examples/queries: every engine answers all, alike, and as plain loops over the rows do."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hand_made import add_failure, features, source
from repository import ROOT
from small_runs import settings
from tables_by_hand import commit_by_hand, made_table

from pipelines.extract.shards import ShardWriter
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.schemas import ASSIGNMENTS, CENTROIDS, MATCHES, PAIRS, PARTS_IMAGES, PARTS_PATCHES
from pipelines.store.store import Store

RUN = ROOT / "examples" / "queries" / "run.py"
QUESTIONS = 10
ROWS, COLS = 3, 4


@pytest.fixture(scope="module")
def examples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("queries_run", RUN)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of two labels with every table, filled at random."""
    folder, rng = tmp_path_factory.mktemp("queries") / "store", np.random.default_rng(5)
    made = Store.create(str(folder), settings())
    ids = [f"{label}/{number}.jpg" for label in ("cat", "dog") for number in range(3)]
    for run, some in enumerate((ids[:4], ids[4:])):
        writer = ShardWriter(made.uri, made.config, run_id := f"20260101T00000{run}Z-00000{run}")
        for at, image_id in enumerate(some):
            described = dataclasses.replace(features(), embedding=rng.normal(size=8).astype(np.float32))
            writer.add({**source(image_id, at), "label": image_id.split("/")[0]}, described)
        patches, images = writer.close()
        report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
        Committer(made, run_id, set()).commit([report], dict.fromkeys(some, (10, "v1")))
    add_failure(made, "20260101T000000Z-000000", "broken.jpg")
    cells = [(image_id, row, col) for image_id in ids for row in range(ROWS) for col in range(COLS)]
    names, rows, cols = (list(values) for values in zip(*cells, strict=True))
    count = len(cells)
    sets = [image_id.split("/")[0] for image_id in ids]
    of_cells = {"image_id": names, "row": rows, "col": cols, "set_id": [one.split("/")[0] for one in names]}
    write(folder / "clusters/words/assignments", ASSIGNMENTS, **of_cells, cluster_id=rng.integers(0, 4, count),
          distance=rng.random(count))  # fmt: skip
    write(folder / "clusters/words/centroids", CENTROIDS, cluster_id=[0, 1, 2, 3])
    write(folder / "parts/parts/images", PARTS_IMAGES, image_id=ids, set_id=sets, foreground_fraction=rng.random(6))
    write(folder / "parts/parts/patches", PARTS_PATCHES, **of_cells, part_id=rng.integers(-1, 2, count))
    pairs = [(a, b) for a in ids for b in ids if a < b]
    of_pairs = {"image_a": [a for a, _ in pairs], "image_b": [b for _, b in pairs]}
    write(folder / "matches/nearest/pairs", PAIRS, **of_pairs)
    write(folder / "matches/nearest/matches", MATCHES, **of_pairs, similarity=rng.random(len(pairs)))
    return folder


def write(folder: Path, schema: pa.Schema, **columns: Any) -> None:
    """A table in one file, empty values in the columns that are not given."""
    table, count = made_table(str(folder), schema), len(next(iter(columns.values())))
    arrays = [
        pa.array(list(columns[field.name]), field.type) if field.name in columns else pa.nulls(count, field.type)
        for field in schema
    ]
    commit_by_hand(table, [table.write_file("part-x.parquet", pa.table(arrays, schema=schema))], [], "x")


@pytest.fixture(scope="module", params=["duckdb", "polars", "spark"])
def answers(request: pytest.FixtureRequest, examples: ModuleType, store: Path) -> dict[str, list[dict[str, Any]]]:
    engine = request.param
    if engine == "spark":
        pytest.importorskip("pyspark", reason="Spark is not installed: pip install pyspark, and a Java")
    tables = examples.tables_of(str(store), "words", "parts", "nearest")
    ask = examples.ENGINES[engine](tables)
    return {name: ask(sql).to_pylist() for name, sql in examples.questions(engine, tables)}


def rows(store: Path, table: str) -> list[dict[str, Any]]:
    return DeltaTable(store / table).to_pyarrow_table().to_pylist()


def test_every_question_has_an_answer(answers: dict[str, list[dict[str, Any]]]) -> None:
    assert len(answers) == QUESTIONS and all(answers.values()), {name: len(found) for name, found in answers.items()}


def clusters_per_label(store: Path) -> list[tuple[Any, ...]]:
    labels = {row["image_id"]: row["label"] for row in rows(store, "images")}
    counted = Counter((labels[row["image_id"]], row["cluster_id"]) for row in rows(store, "clusters/words/assignments"))
    result = []
    for label in sorted({label for label, _ in counted}, key=str):
        own = sorted(((-n, cluster) for (of, cluster), n in counted.items() if of == label))[:3]
        result += [(label, place, cluster, -n) for place, (n, cluster) in enumerate(own, 1)]
    return result


def unusual_parts(store: Path) -> list[tuple[Any, ...]]:
    found = [row for row in rows(store, "parts/parts/patches") if row["part_id"] >= 0]
    sizes = Counter((row["set_id"], row["image_id"], row["part_id"]) for row in found)
    result = []
    for (set_id, image_id, part_id), count in sizes.items():
        same = [n for (of, _, part), n in sizes.items() if (of, part) == (set_id, part_id)]
        if len(same) > 1 and (deviation := float(np.std(same, ddof=1))):
            result.append((set_id, image_id, part_id, count, (count - float(np.mean(same))) / deviation))
    return sorted(result, key=lambda row: (-abs(row[4]), row[1], row[2]))[:10]


def near_duplicates(store: Path) -> list[tuple[Any, ...]]:
    vectors = {row["image_id"]: np.asarray(row["embedding"], float) for row in rows(store, "images")}
    found = [
        (a, b, float(vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b])))
        for a in vectors
        for b in vectors
        if a < b
    ]
    return sorted(found, key=lambda row: (-row[2], row[0], row[1]))[:10]


def outliers(store: Path) -> list[tuple[Any, ...]]:
    of_image: dict[str, list[float]] = {}
    for row in rows(store, "clusters/words/assignments"):
        of_image.setdefault(row["image_id"], []).append(row["distance"])
    labels = {row["image_id"]: row["label"] for row in rows(store, "images")}
    found = [(image_id, labels[image_id], float(np.mean(values))) for image_id, values in of_image.items()]
    return sorted(found, key=lambda row: (-row[2], row[0]))[:10]


def growth(store: Path) -> list[tuple[Any, ...]]:
    counted = sorted(Counter(row["run_id"] for row in rows(store, "images")).items())
    return [(run, n, sum(count for _, count in counted[: at + 1])) for at, (run, n) in enumerate(counted)]


def failures(store: Path) -> list[tuple[Any, ...]]:
    return [("decode", "ImageError", 1, "broken.jpg")]


def clusters_together(store: Path) -> list[tuple[Any, ...]]:
    of_image: dict[str, set[int]] = {}
    for row in rows(store, "clusters/words/assignments"):
        of_image.setdefault(row["image_id"], set()).add(row["cluster_id"])
    counted = Counter((a, b) for present in of_image.values() for a in present for b in present if a < b)
    return [(a, b, n) for (a, b), n in sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:10]]


def where_a_cluster_is(store: Path) -> list[tuple[Any, ...]]:
    assigned = rows(store, "clusters/words/assignments")
    counted = Counter(row["cluster_id"] for row in assigned)
    largest = min(counted, key=lambda cluster: (-counted[cluster], cluster))
    centres = {(row["image_id"], row["row"], row["col"]): (row["x"], row["y"]) for row in rows(store, "patches")}
    of_image: dict[str, list[tuple[float, float]]] = {}
    for row in assigned:
        if row["cluster_id"] == largest:
            of_image.setdefault(row["image_id"], []).append(centres[row["image_id"], row["row"], row["col"]])
    found = []
    for image_id, points in of_image.items():
        (x0, y0), (x1, y1) = np.min(points, 0).tolist(), np.max(points, 0).tolist()
        found.append((image_id, len(points), x0, y0, x1, y1))
    return sorted(found, key=lambda row: (-row[1], row[0]))[:10]


def foreground_per_label(store: Path) -> list[tuple[Any, ...]]:
    labels = {row["image_id"]: row["label"] for row in rows(store, "images")}
    of_label: dict[Any, list[float]] = {}
    for row in rows(store, "parts/parts/images"):
        of_label.setdefault(labels[row["image_id"]], []).append(row["foreground_fraction"])
    found = [(label, len(values), float(np.mean(values))) for label, values in of_label.items()]
    return sorted(found, key=lambda row: (-row[2], str(row[0])))


def best_matches(store: Path) -> list[tuple[Any, ...]]:
    found = [(row["image_a"], row["image_b"], 1, row["similarity"]) for row in rows(store, "matches/nearest/matches")]
    return sorted(found, key=lambda row: (-row[3], row[0], row[1]))[:10]


LOOPS: dict[str, Callable[[Path], list[tuple[Any, ...]]]] = {
    "01-clusters-per-label": clusters_per_label,
    "02-unusual-parts": unusual_parts,
    "03-near-duplicates": near_duplicates,
    "04-outliers": outliers,
    "05-growth": growth,
    "06-failures": failures,
    "07-clusters-together": clusters_together,
    "08-where-a-cluster-is": where_a_cluster_is,
    "09-foreground-per-label": foreground_per_label,
    "10-best-matches": best_matches,
}


@pytest.mark.parametrize("name", LOOPS)
def test_answers_are_those_of_loops(answers: dict[str, list[dict[str, Any]]], store: Path, name: str) -> None:
    expected = LOOPS[name](store)
    found = [
        tuple(float(value) if hasattr(value, "as_tuple") else value for value in row.values()) for row in answers[name]
    ]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_script(store: Path) -> None:
    done = subprocess.run([sys.executable, str(RUN), str(store)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n-- ") == QUESTIONS and "cat/0.jpg" in done.stdout


def test_a_store_without_results_answers_what_it_can(examples: ModuleType, tmp_path: Path) -> None:
    Store.create(str(tmp_path / "store"), settings())
    tables = examples.tables_of(str(tmp_path / "store"), "words", "parts", "nearest")
    asked = [name for name, _ in examples.questions("duckdb", tables)]
    assert asked == ["03-near-duplicates", "05-growth", "06-failures"]
