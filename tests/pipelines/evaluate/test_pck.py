"""evaluate pck: both layouts of annotations on a store whose right answers are known, and requests that cannot be met.

The images are views of one scene of random descriptors, shifted by whole patches, so that every patch has exactly one
right answer; annotated target points lie a known number of pixels beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import source
from scipy.io import savemat
from small_runs import settings
from typer.testing import CliRunner, Result

from dino_ops.extractor import ImageFeatures
from pipelines.cli import app
from pipelines.evaluate import pck
from pipelines.extract.shards import ShardWriter
from pipelines.running.reports import new_run_id
from pipelines.settings.loading import load_config
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.patches import read_patch_maps
from pipelines.store.store import Store
from pipelines.upkeep import stats

GRID = 16  # patches along both sides
SHIFTS = {"cat/a.png": (0, 0), "cat/b.png": (2, 1), "dog/c.png": (1, 3)}  # rows and columns of the scene
SCALES = {"cat/a.png": 8, "cat/b.png": 10, "dog/c.png": 8}  # pixels of the original between patches
CELLS = [(5, 6), (8, 9), (10, 4), (6, 11)]  # rows and columns of annotated patches in the scene
OFFSETS = [0.0, 7.0, 8.5, 30.0]  # pixels between the right patch's centre and the annotated target point
EXTRA = "features.extra=[{layer: 9, facet: key}]"


def view(image_id: str) -> ImageFeatures:
    """Part of the scene; its extra descriptor is noise that matches nothing."""
    scene = np.random.default_rng(0).normal(size=(GRID + 4, GRID + 4, 8)).astype(np.float32)
    noise = np.random.default_rng(len(image_id) + SHIFTS[image_id][0]).normal(size=(GRID, GRID, 8))
    top, left = SHIFTS[image_id]
    y, x = np.mgrid[:GRID, :GRID].astype(np.float32)
    scale, side = SCALES[image_id], SCALES[image_id] * GRID
    return ImageFeatures(
        descriptor=scene[top : top + GRID, left : left + GRID],
        extra={"key9": noise.astype(np.float32)},
        saliency=np.ones((GRID, GRID), np.float32),
        embedding=np.ones(8, np.float32),
        y=(y + 0.5) * scale,
        x=(x + 0.5) * scale,
        width=side,
        height=side,
        model_width=64,
        model_height=64,
    )


def make_store(folder: Path, *overrides: str, views: Mapping[str, str] | None = None) -> Path:
    """A store of views of the scene, by image_id; all of them under their own names unless said otherwise."""
    store = Store.create(str(folder), settings(EXTRA, *overrides))
    add_images(store, views or {name: name for name in SHIFTS})
    return folder


def add_images(store: Store, views: Mapping[str, str]) -> None:
    run_id = new_run_id()
    writer = ShardWriter(store.uri, store.config, run_id)
    for at, (image_id, name) in enumerate(views.items()):
        writer.add(source(image_id, at), view(name))
    patches, images = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    Committer(store, run_id, set()).commit([report], {image_id: (10, "v1") for image_id in views})


def points_xy(name: str, offsets: list[float]) -> np.ndarray:
    """Centres of the annotated patches in an image, moved to the right by some pixels: (4, 2)."""
    top, left = SHIFTS[name]
    centres = [((col - left + 0.5) * SCALES[name], (row - top + 0.5) * SCALES[name]) for row, col in CELLS]
    return np.array([(x + offset, y) for (x, y), offset in zip(centres, offsets, strict=True)])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store")


@pytest.fixture
def spair(tmp_path: Path) -> Path:
    """One pair, cat/a to cat/b, whose target's box is 40 x 60 pixels; another split is empty."""
    folder = tmp_path / "SPair"
    pair = {
        "category": "cat",
        "src_imname": "a.png",
        "trg_imname": "b.png",
        "src_kps": points_xy("cat/a.png", [0] * 4).tolist(),
        "trg_kps": points_xy("cat/b.png", OFFSETS).tolist(),
        "src_bndbox": [0, 0, 10, 10],
        "trg_bndbox": [10, 20, 50, 80],
    }
    for split in ("test", "val"):
        (folder / "PairAnnotation" / split).mkdir(parents=True)
    (folder / "PairAnnotation" / "test" / "000001-a-b:cat.json").write_text(json.dumps(pair))
    return folder


@pytest.fixture
def willow(tmp_path: Path) -> Path:
    """Three images of a class, whose points are annotated exactly but for one: a's last is 30 pixels off."""
    folder = tmp_path / "willow"
    for name in SHIFTS:
        image = folder / "things" / name.replace("/", "_")
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"")
        offsets = [0, 0, 0, 30.0 if name == "cat/a.png" else 0]
        savemat(image.with_suffix(".mat"), {"pts_coord": points_xy(name, offsets).T})
    return folder


def evaluate(store: Path, annotations: Path, *overrides: str, options: tuple[str, ...] = ()) -> Result:
    changed = [part for override in overrides for part in ("--set", override)]
    return CliRunner().invoke(
        app, ["evaluate", "pck", str(store), "--annotations", str(annotations), *options, *changed]
    )


def scores(result: pck.Result) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    return {(row["category"], row["threshold"]): (row["per_pair"], row["per_point"]) for row in result.scores}


def sentence(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("dinoray: ")


def test_spair_by_hand(store: Path, spair: Path) -> None:
    """Errors are 0, 7, 8.5 and 30 pixels. Lengths: box 60, image 160 (the source has 128), key points 91.5."""
    result = pck.run(settings(), store=str(store), annotations=str(spair))
    assert (result.layout, result.images, result.pairs, result.points) == ("spair-71k", 2, 1, 4)
    assert np.ptp(points_xy("cat/b.png", OFFSETS), axis=0).tolist() == [91.5, 50]
    expected = {"box": [0.25, 0.25, 0.75], "image": [0.5, 0.75, 0.75], "keypoint_box": [0.25, 0.75, 0.75]}
    for threshold, values in expected.items():
        for category in ("cat", "all"):
            assert scores(result)[category, threshold] == (values, values), threshold
    assert list(result.thresholds) == ["keypoint_box", "box", "image"]


def test_willow_counts_all_ordered_pairs_of_a_class(tmp_path: Path, willow: Path) -> None:
    """a's last point is 30 pixels off: as a target it is wrong, as a source another patch is asked for."""
    views = {f"train/things/{name.replace('/', '_')}": name for name in SHIFTS}
    store = make_store(tmp_path / "store", views=views)
    result = pck.run(settings("evaluate.alphas=[0.1]"), store=str(store), annotations=str(willow))
    assert (result.layout, result.images, result.pairs, result.points) == ("pf-willow", 3, 6, 24)
    expected = ([round(20 / 24, 6)], [round(20 / 24, 6)])  # two pairs have a as target, two as source
    assert scores(result)["all", "image"] == scores(result)["things", "image"] == expected
    assert "box" not in result.thresholds


def test_tiles_bound_what_is_held_and_change_nothing(
    tmp_path: Path, willow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", views={f"things/{name.replace('/', '_')}": name for name in SHIFTS})
    held = []

    def read(store: str, images: Iterable[Any], *arguments: Any) -> Any:
        held.append(len(list(images)))
        return read_patch_maps(store, images, *arguments)

    monkeypatch.setattr(pck, "read_patch_maps", read)
    whole = pck.run(settings(), store=str(store), annotations=str(willow))
    monkeypatch.setattr(pck, "MAX_PATCHES_IN_MEMORY", 1)
    tiled = pck.run(settings(), store=str(store), annotations=str(willow))
    assert held == [3] + [2] * 6
    assert tiled.scores == whole.scores


def test_the_column_that_was_asked_for_is_compared(store: Path, spair: Path) -> None:
    config = settings("evaluate.descriptor=descriptor_key9", "evaluate.binned=false")
    result = pck.run(config, store=str(store), annotations=str(spair))
    assert (result.facet, result.layer, result.binned) == ("key", 9, False)
    assert scores(result)["all", "image"][0][0] <= 0.25  # noise


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_way_of_storing(tmp_path: Path, spair: Path, dtype: str) -> None:
    store = make_store(tmp_path / dtype, f"store.dtype={dtype}")
    result = pck.run(settings(), store=str(store), annotations=str(spair))
    assert scores(result)["all", "image"][0] == [0.5, 0.75, 0.75]


def test_table_json_and_report_say_the_same(store: Path, spair: Path) -> None:
    shown = evaluate(store, spair)
    assert shown.exit_code == 0, shown.output
    assert "1 pair of 2 images (spair-71k), key of layer 11, binned" in shown.stdout
    assert "PCK by box: alpha x longer side of the target's annotated bounding box" in shown.stdout
    for alpha in ("@0.05", "@0.1", "@0.15"):
        assert alpha in shown.stdout
    content = json.loads(evaluate(store, spair, options=("--json",)).stdout)
    report = json.loads((store / "runs" / f"{content['run_id']}.json").read_text())
    assert (report["command"], report["status"]) == ("evaluate pck", "done")
    assert report["result"]["scores"] == content["scores"]
    assert report["asked"] == {"annotations": str(spair)}
    runs = stats.run(load_config(), store=str(store)).runs
    assert [run["command"] for run in runs] == ["evaluate pck"] * 2


def test_a_store_that_cannot_be_written_is_evaluated_all_the_same(
    store: Path, spair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "runs")

    monkeypatch.setattr("pipelines.storage.write_json", refuse)
    result = evaluate(store, spair)
    assert result.exit_code == 0 and "PCK by image" in result.stdout
    assert "report could not be written" in result.stderr


def test_a_dry_run_reads_and_writes_nothing(tmp_path: Path) -> None:
    result = evaluate(tmp_path / "none", tmp_path / "neither", options=("--dry-run",))
    assert result.exit_code == 0 and "would evaluate pck" in result.stdout


def test_an_unknown_task_names_the_ones_there_are() -> None:
    for options in ((), ("--json",)):
        result = CliRunner().invoke(app, ["evaluate", "pkc", "store", *options])
        assert "no task 'pkc'" in sentence(result) and "pck or knn or linear or retrieval" in sentence(result)
        assert bool(result.stdout) == bool(options)


def test_images_that_the_store_lacks_are_named(tmp_path: Path, spair: Path) -> None:
    store = make_store(tmp_path / "store", views={"cat/a.png": "cat/a.png"})
    assert "no image whose image_id ends with cat/b.png: extract" in sentence(evaluate(store, spair))
    assert not (store / "runs").exists()


def test_an_image_that_is_there_twice(tmp_path: Path, spair: Path) -> None:
    store = make_store(tmp_path / "store")
    add_images(Store.open(str(store), settings()), {"more/cat/b.png": "cat/b.png"})
    said = sentence(evaluate(store, spair))
    assert "cat/b.png" in said and "more/cat/b.png" in said


def test_an_empty_store(tmp_path: Path, spair: Path) -> None:
    Store.create(str(tmp_path / "store"), settings())
    assert "no image whose image_id ends with cat/a.png (and 1 more of 2)" in sentence(
        evaluate(tmp_path / "store", spair)
    )


def test_a_column_that_is_not_there_names_those_that_are(store: Path, spair: Path) -> None:
    said = sentence(evaluate(store, spair, "evaluate.descriptor=descriptor_key7"))
    assert "descriptor_key7, but the store's patches have descriptor, descriptor_key9" in said


@pytest.mark.parametrize("thinned", ["store.every=2", "store.patches=salient", "store.patches=none"])
def test_a_store_without_all_patches(tmp_path: Path, spair: Path, thinned: str) -> None:
    store = make_store(tmp_path / "thin", thinned)
    assert f"does not hold the whole grid of patches ({thinned})" in sentence(evaluate(store, spair))


def test_annotations_that_are_not_there(store: Path, spair: Path, tmp_path: Path) -> None:
    assert "There is no folder" in sentence(evaluate(store, tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "holds no annotations" in sentence(evaluate(store, tmp_path / "empty"))
    assert "no .json for split 'val'" in sentence(evaluate(store, spair, "evaluate.split=val"))
    assert "no .json for split 'trn'" in sentence(evaluate(store, spair, "evaluate.split=trn"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trg_bndbox": None}, "is not an annotation of a pair"),
        ({"trg_kps": [[1, 2]]}, "the same key points"),
        ({"src_kps": [], "trg_kps": []}, "at least one"),
        ({"src_kps": [["x", 1]] * 4}, "is not an annotation of a pair"),
        ({"src_kps": [[float("nan"), 1]] * 4}, "not a finite number"),
        ({"category": ...}, "it lacks category"),
        (None, "is not an annotation of a pair"),
    ],
)
def test_a_damaged_annotation_of_a_pair(store: Path, spair: Path, change: Any, expected: str) -> None:
    (file,) = (spair / "PairAnnotation" / "test").iterdir()
    content = json.loads(file.read_text()) | (change or {})
    left = {key: value for key, value in content.items() if value is not ...}
    file.write_text(json.dumps(left) if change else "{")
    said = sentence(evaluate(store, spair))
    assert expected in said and file.name in said


def test_damaged_matlab_files(store: Path, willow: Path) -> None:
    file = willow / "things" / "cat_b.mat"
    for content, expected in ((b"", "cannot be read"), (b"not MATLAB" * 40, "cannot be read")):
        file.write_bytes(content)
        said = sentence(evaluate(store, willow))
        assert expected in said and "cat_b.mat" in said
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    file.write_bytes(header + bytes(384))
    assert "is a MATLAB 7.3 file" in sentence(evaluate(store, willow))
    savemat(file, {"other": np.zeros((2, 10))})
    assert "lacks pts_coord" in sentence(evaluate(store, willow))
    savemat(file, {"pts_coord": np.zeros((3, 10))})
    assert "shape (3, 10)" in sentence(evaluate(store, willow))
    savemat(file, {"pts_coord": np.zeros((2, 3))})
    assert "the same key points" in sentence(evaluate(store, willow))
    savemat(willow / "things" / "without.mat", {"pts_coord": np.zeros((2, 4))})
    assert "without.mat has no image of the same name" in sentence(evaluate(store, willow))


def test_images_of_another_size_than_was_annotated(store: Path, spair: Path) -> None:
    """SPair-71k says width, height and channels. Points on a resized copy would be measured in the wrong place."""
    (file,) = (spair / "PairAnnotation" / "test").iterdir()
    content = json.loads(file.read_text()) | {"src_imsize": [128, 128, 3], "trg_imsize": [160, 160, 3]}
    file.write_text(json.dumps(content))
    assert evaluate(store, spair).exit_code == 0
    file.write_text(json.dumps(content | {"trg_imsize": [320, 240, 3]}))
    said = sentence(evaluate(store, spair))
    assert "cat/b.png was annotated at 320 x 240 pixels" in said and "with 160 x 160: extract" in said
    file.write_text(json.dumps(content | {"src_imsize": [3]}))
    assert "is not an annotation of a pair" in sentence(evaluate(store, spair))


def test_points_outside_of_their_images_count_and_are_said(store: Path, spair: Path) -> None:
    (file,) = (spair / "PairAnnotation" / "test").iterdir()
    content = json.loads(file.read_text())
    content["src_kps"][0], content["trg_kps"][3] = [-5, 20], [80, 161]
    file.write_text(json.dumps(content))
    result = pck.run(settings(), store=str(store), annotations=str(spair))
    assert result.points == 4
    assert result.messages == [
        "2 of 8 annotated points lie outside their images: for such a source point the nearest patch is used."
    ]


def test_annotations_in_a_bucket_that_nobody_answers_for(store: Path) -> None:
    """One sentence in place of the driver's own error, which is no OSError."""
    nobody = "storage.options={endpoint_url: 'http://127.0.0.1:9', key: a, secret: b}"
    retries = "storage.options.config_kwargs={retries: {max_attempts: 0}, connect_timeout: 1}"
    changed = [part for one in (nobody, retries) for part in ("--set", one)]
    result = CliRunner().invoke(app, ["evaluate", "pck", str(store), "--annotations", "s3://bucket/spair", *changed])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "s3://bucket/spair cannot be reached: " in line and "endpoint" in line


def test_a_patches_file_that_is_damaged(store: Path, spair: Path) -> None:
    (file,) = (store / "patches").glob("*.parquet")
    file.write_bytes(b"no Parquet")
    result = evaluate(store, spair)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert file.name in line and "is damaged" in line and "dinoray repair" in line


def test_annotations_that_cannot_be_read(store: Path, spair: Path) -> None:
    """A link to nowhere stands for any file that the system refuses to open; root may read all others."""
    (file,) = (spair / "PairAnnotation" / "test").iterdir()
    file.unlink()
    file.symlink_to("nowhere.json")
    assert "cannot be read" in sentence(evaluate(store, spair))
