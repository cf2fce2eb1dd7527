"""What the weights that come with dinoray are worth: the same network, trained and at random initialisation.

    python -m benchmarks.pretrained                          (about half an hour on two cores)
    python -m benchmarks.pretrained --weights backbone.safetensors

Apart from `make bench`, because it measures weights and not code. Every figure is one that dinoray's own commands
print: k-NN and linear accuracy on Imagenette (learnt from the photos that the weights were trained on, tested on the
500 others), PF-WILLOW's PCK and MSRC cows' Jaccard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.photos import TEST_DATA
from benchmarks.results import Row, report
from dino_ops.packaged import packaged_weights

WORK = Path(__file__).with_name("work") / "pretrained"
MODEL = "dinoray_tiny"
# Weights that were trained on a GPU should reach it.
KNN_ACCURACY_AIM = 0.70
# DINO's authors report this k.
KNN_VOTERS = 20
# The model was trained with about this size; the photos have 128 pixels.
IMAGE_SIZE_SETTING = "image.shorter_side=96"

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a file to try instead of the packaged one")
    parser.add_argument("--limit", type=int, help="at most this many images of each data set, to see that it runs")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    if not TEST_DATA.is_dir():
        parser.error(f"there are no data at {TEST_DATA}: set DINORAY_TEST_DATA")
    file = arguments.weights or packaged_weights(MODEL)
    if not file.is_file():
        parser.error(f"there is no weights file {file}")
    trained = _figures(str(file.resolve()), arguments.only, arguments.limit)
    random = _figures("random", arguments.only, arguments.limit)
    content = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    limited = f", at most {arguments.limit} images of each data set" if arguments.limit else ""
    report(
        f"weights of {MODEL}, sha256 {content}{limited}", [_row(what, trained[what], random[what]) for what in trained]
    )


def _figures(weights: str, parts: list[str], limit: int | None) -> Figures:
    if WORK.exists():
        shutil.rmtree(WORK)
    figures: Figures = {}
    for part in parts:
        found = PARTS[part](weights, limit)
        print(weights, found, file=sys.stderr, flush=True)
        figures |= found
    return figures


def _row(what: str, trained: float, random: float) -> Row:
    bar = max(KNN_ACCURACY_AIM, random) if what == _knn_name(KNN_VOTERS) else random
    return Row(what, trained, f">= {bar:.2f}", f"{trained:.4f}; at random initialisation {random:.4f}")


def imagenette(weights: str, limit: int | None) -> Figures:
    """Top-1 accuracy of embeddings on the validation photos."""
    train, val = (
        _extract(name, TEST_DATA / "imagenette" / files, weights, limit, "store.patches=none", IMAGE_SIZE_SETTING)
        for name, files in (("train", "train/*.tar"), ("val", "val"))
    )
    knn = _dinoray("evaluate", "knn", train, "--test", val)["accuracy"]
    linear = _dinoray("evaluate", "linear", train, "--test", val)["accuracy"]
    return {_knn_name(int(k)): share for k, share in knn.items()} | {"Imagenette linear, top-1": linear["linear"]}


def pf_willow(weights: str, limit: int | None) -> Figures:
    """PCK@0.1 of log-binned keys of block 9, by both conventions of the length."""
    photos = TEST_DATA / "pf-willow" if limit is None else _some_of_a_class(TEST_DATA / "pf-willow", limit)
    store = _extract("pf-willow", photos, weights, None, "features.stride=8", "features.layer=9")
    result = _dinoray("evaluate", "pck", store, "--annotations", str(photos), "--set", "evaluate.binned=true")
    at = result["alphas"].index(0.1)
    overall = {row["threshold"]: row["per_point"][at] for row in result["scores"] if row["category"] == "all"}
    return {f"PF-WILLOW PCK@0.1, {length}": overall[length] for length in ("keypoint_box", "image")}


def _some_of_a_class(photos: Path, count: int) -> Path:
    """A copy of `count` images of the first class with their annotations, since pck wants all that are annotated."""
    pictures = sorted(photos.rglob("*.png"))[:count]
    for picture in pictures:
        copy = WORK / "pf-willow-photos" / picture.parent.name / picture.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".png", ".mat"):
            shutil.copyfile(picture.with_suffix(suffix), copy.with_suffix(suffix))
    return WORK / "pf-willow-photos"


def msrc_cows(weights: str, limit: int | None) -> Figures:
    """Jaccard of the common foreground of all photos with the annotated masks."""
    photos = TEST_DATA / "msrc-cow"
    store = _extract("msrc-cow", photos / "images", weights, limit, "features.stride=8")
    _dinoray("cosegment", store, "cows", "--sets", "directory", "--set", "cosegment.num_parts=1")
    result = _dinoray("evaluate", "segmentation", store, "cows", "--masks", str(photos / "masks"))
    return {"MSRC cows, Jaccard": result["jaccard"], "MSRC cows, precision": result["precision"]}


PARTS: dict[str, Callable[[str, int | None], Figures]] = {
    "imagenette": imagenette,
    "pf-willow": pf_willow,
    "msrc-cows": msrc_cows,
}


def _knn_name(k: int) -> str:
    return f"Imagenette k-NN, top-1, k = {k}"


def _extract(name: str, photos: Path, weights: str, limit: int | None, *settings: str) -> str:
    store = str(WORK / name)
    given = [f"model.name={MODEL}", f"model.weights={weights}", *settings]
    options = [part for one in given for part in ("--set", one)]
    _dinoray("extract", str(photos), store, *options, *(["--limit", str(limit)] if limit else []))
    return store


def _dinoray(*arguments: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("dinoray")), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
