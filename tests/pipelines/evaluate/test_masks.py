"""dinoray evaluate segmentation and parts, against scikit-learn and plain counting, on tables made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy.io import savemat
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from small_runs import as_options, settings
from tables_by_hand import commit_by_hand
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.errors import RequestError
from pipelines.evaluate import parts, segmentation
from pipelines.evaluate.truth import match_names
from pipelines.results.masks import foreground_png, part_png
from pipelines.results.parts import PartTables
from pipelines.store.schemas import PARTS_IMAGES, PARTS_PATCHES
from pipelines.store.store import Store

SHAPE = (30, 40)


def labels(seed: int, most: int = 4) -> np.ndarray:
    """Blocks of -1 (background) to most - 1."""
    coarse = np.random.default_rng(seed).integers(-1, most, (3, 4))
    return coarse.repeat(10, 0).repeat(10, 1)


@pytest.fixture
def found() -> dict[tuple[str, str], np.ndarray]:
    """(set_id, image_id) -> parts, -1 for background."""
    keys = [
        ("cow", "photos/cow/1.jpg"),
        ("cow", "photos/cow/2.jpg"),
        ("car", "photos/car/1.jpg"),
        ("car", "photos/car/3.jpg"),
    ]
    return {key: labels(number) for number, key in enumerate(keys)}


@pytest.fixture
def store(tmp_path: Path, found: dict[tuple[str, str], np.ndarray]) -> Store:
    made = Store.create(str(tmp_path / "store"), settings())
    tables = PartTables.open_or_make(made.uri, "things", {})
    rows = [
        {
            "image_id": image_id,
            "set_id": set_id,
            "foreground_fraction": float((one >= 0).mean()),
            "mask_png": part_png(one),
            "foreground_png": foreground_png(one > 0),
            "shard": "part-x.parquet",
            "run_id": "r",
            "set_version": "v",
        }
        for (set_id, image_id), one in sorted(found.items(), key=lambda item: item[0][1])
    ]
    patches = pa.Table.from_pylist([{**row, "row": 0, "col": 0, "part_id": 0} for row in rows], schema=PARTS_PATCHES)
    commit_by_hand(tables.patches, [tables.patches.write_file("part-x.parquet", patches)], [], "r")
    commit_by_hand(
        tables.images, [tables.images.write_file("part-x.parquet", pa.Table.from_pylist(rows, PARTS_IMAGES))], [], "r"
    )
    return made


def save(file: Path, values: np.ndarray, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(file, **options)


def test_segmentation_counts_pixels(store: Store, tmp_path: Path, found: dict[tuple[str, str], np.ndarray]) -> None:
    """Values above 127 are foreground; masks of another size are brought to the image's; the rest is told."""
    truth = {}
    for number, (key, _) in enumerate(found.items()):
        if key[1] == "photos/car/3.jpg":
            continue
        true = labels(number + 50) > 0
        truth[key] = true
        file = tmp_path / "masks" / f"{key[1].removeprefix('photos/').removesuffix('.jpg')}.png"
        values = np.where(true, 128 + number, 127 - number)
        save(file, values[::2, ::2] if number == 1 else values)
    save(tmp_path / "masks" / "other.png", np.zeros(SHAPE))
    result = segmentation.run(settings(), store=store.uri, name="things", masks=str(tmp_path / "masks"))
    assert (result.images, result.without_truth, result.resized) == (3, 1, 1)
    assert result.messages == [f"1 image has no annotation in {tmp_path}/masks and does not count: photos/car/3.jpg."]
    ious, right = {}, {}
    for key, true in truth.items():
        ours = found[key] > 0
        ious[key] = (ours & true).sum() / (ours | true).sum()
        right[key] = (ours == true).mean()
    scores = {score["set"]: score for score in result.scores}
    assert scores["all"]["jaccard"] == result.jaccard == pytest.approx(np.mean([*ious.values()]), abs=1e-6)
    assert result.precision == pytest.approx(np.mean([*right.values()]), abs=1e-6)
    cows = [value for key, value in ious.items() if key[0] == "cow"]
    assert scores["cow"]["images"] == 2 and scores["cow"]["jaccard"] == pytest.approx(np.mean(cows), abs=1e-6)
    assert 0 <= result.corloc <= 1 and set(result.conventions) == {"jaccard", "precision", "corloc"}
    report = json.loads((Path(store.uri) / "runs" / f"{result.run_id}.json").read_text())
    assert report["result"]["jaccard"] == result.jaccard


def test_a_perfect_segmentation(store: Store, tmp_path: Path, found: dict[tuple[str, str], np.ndarray]) -> None:
    for (_, image_id), one in found.items():
        save(tmp_path / "masks" / Path(image_id).with_suffix(".png"), np.where(one > 0, 255, 0))
    asked = ["evaluate", "segmentation", store.uri, "things", "--masks", str(tmp_path / "masks"), *as_options()]
    shown = CliRunner().invoke(app, [*asked, "--json"])
    assert shown.exit_code == 0
    content = json.loads(shown.stdout)
    assert (content["jaccard"], content["precision"], content["corloc"], content["images"]) == (1, 1, 1, 4)
    assert "intersection over union of the foregrounds" in CliRunner().invoke(app, asked).output


@pytest.mark.parametrize("palette", [False, True])
def test_part_labels(store: Store, tmp_path: Path, found: dict[tuple[str, str], np.ndarray], palette: bool) -> None:
    """Each set by itself, since parts are numbered from 0 in each; 255 does not count."""
    truth = {}
    for number, (key, _) in enumerate(found.items()):
        true = labels(number + 70) + 1
        true[:5] = 255
        truth[key] = true
        file = tmp_path / "labels" / Path(key[1]).with_suffix(".png")
        save(file, true)
        if palette:
            image = Image.open(file).copy()
            image = image.convert("P")
            image.putdata(true.ravel().tolist())
            image.putpalette(np.random.default_rng(0).integers(0, 255, 768).tolist())
            image.save(file)
    result = parts.run(settings(), store=store.uri, name="things", annotations=str(tmp_path / "labels"))
    assert (result.kind, result.images, result.without_truth) == ("labels", 4, 0)
    scores = {(score["items"], score["set"]): score for score in result.scores}
    for items, least in (("pixels", 0), ("foreground", 1)):
        means = []
        for set_id in ("cow", "car"):
            keys = [key for key in found if key[0] == set_id]
            true = np.concatenate([truth[key].ravel() for key in keys])
            ours = np.concatenate([found[key].ravel() for key in keys])
            kept = (true != 255) & (true >= least)
            expected = [
                measure(true[kept], ours[kept]) for measure in (normalized_mutual_info_score, adjusted_rand_score)
            ]
            score = scores[items, set_id]
            assert score["count"] == kept.sum()
            assert [score["nmi"], score["ari"]] == pytest.approx(expected, abs=1e-6)
            means.append(expected)
        whole = scores[items, "all"]
        assert [whole["nmi"], whole["ari"]] == pytest.approx(np.mean(means, axis=0), abs=1e-6)
    assert (result.nmi, result.ari) == (scores["pixels", "all"]["nmi"], scores["pixels", "all"]["ari"])


def key_points(seed: int) -> np.ndarray:
    """Ten points (x, y), of which the last lies outside."""
    xy = np.random.default_rng(seed).uniform(0, SHAPE[::-1], (10, 2))
    xy[9] = (SHAPE[1] + 3, 2)
    return xy


@pytest.mark.parametrize("layout", ["pf-willow", "spair-71k"])
def test_key_points(store: Store, tmp_path: Path, found: dict[tuple[str, str], np.ndarray], layout: str) -> None:
    folder, truth = tmp_path / "annotated", {}
    for number, (_, image_id) in enumerate(found):
        category, file = image_id.split("/")[1:]
        xy = truth[image_id] = key_points(number)
        if layout == "pf-willow":
            save(folder / category / file, np.zeros(SHAPE))
            savemat(folder / category / f"{Path(file).stem}.mat", {"pts_coord": xy.T})
        else:
            target = folder / "ImageAnnotation" / category / f"{Path(file).stem}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            kps = {str(at): point.tolist() for at, point in enumerate(xy)} | {"11": None}
            target.write_text(json.dumps({"filename": file, "kps": kps}))
    result = parts.run(settings(), store=store.uri, name="things", annotations=str(folder))
    assert (result.kind, result.images) == ("keypoints", 4)
    expected = []
    for set_id in ("cow", "car"):
        ours, names = [], []
        for key, one in found.items():
            if key[0] == set_id:
                for at, (x, y) in enumerate(truth[key[1]][:9]):
                    ours.append(one[int(y), int(x)])
                    names.append(at)
        expected.append([normalized_mutual_info_score(names, ours), adjusted_rand_score(names, ours)])
    assert [result.nmi, result.ari] == pytest.approx(np.mean(expected, axis=0), abs=1e-6)
    assert [score["count"] for score in result.scores] == [18, 18, 36]


def test_requests_that_cannot_be_met(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "others" / "a.png", np.zeros(SHAPE))
    save(tmp_path / "colours" / "photos" / "cow" / "1.png", np.random.default_rng(0).integers(0, 255, (*SHAPE, 3)))
    for name, folder, said in [
        ("animals", "empty", r"no parts animals \(it has things\)"),
        ("things", "nowhere", r"no folder .*nowhere"),
        ("things", "empty", r"holds no image files"),
        ("things", "others", r"No image of .* in .*: photos/car/1.jpg should"),
        ("things", "colours", r"has colours \(RGB\), and a mask has one value"),
    ]:
        with pytest.raises(RequestError, match=said):
            segmentation.run(settings(), store=store.uri, name=name, masks=str(tmp_path / folder))
        with pytest.raises(RequestError, match=said.replace("a mask in", "annotated in")):
            parts.run(settings(), store=store.uri, name=name, annotations=str(tmp_path / folder))
    (tmp_path / "colours" / "photos" / "cow" / "1.png").write_bytes(b"no image")
    with pytest.raises(RequestError, match=r"cow/1.png cannot be read as an image"):
        segmentation.run(settings(), store=store.uri, name="things", masks=str(tmp_path / "colours"))


def test_names_match_by_the_longest_path() -> None:
    ids = ["in/cow/1.jpg", "in/car/1.jpg", "2.jpg", "cow.x/3", "shard.tar/cow/4.JPG"]
    names = ["cow/1.png", "1.png", "deep/2.png", "cow/3.png", "cow/4.png", "x/cow.x/3.png"]
    assert match_names(ids, names) == {
        "in/cow/1.jpg": "cow/1.png",
        "in/car/1.jpg": "1.png",
        "2.jpg": "deep/2.png",
        "cow.x/3": "x/cow.x/3.png",
        "shard.tar/cow/4.JPG": "cow/4.png",
    }
    with pytest.raises(RequestError, match=r"1.jpg could be annotated by a/1.png or by b/1.png"):
        match_names(["1.jpg"], ["a/1.png", "b/1.png"])
