"""The published code's masks and parts, and its figures on MSRC cows, through the command; kills in mid-run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from deltalake import DeltaTable
from PIL import Image
from set_scenes import add_scenes, scene

from pipelines.results.part_checks import disagreements
from pipelines.results.parts import PartTables
from pipelines.settings.loading import load_config
from pipelines.store.store import Store

pytestmark = pytest.mark.slow


def dinoray(*arguments: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("dinoray")), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def model(data: Path) -> list[str]:
    weights = data / "weights" / "deit_tiny_patch16_224_state_dict.pth"
    return [
        "--set",
        "model.name=deit_tiny_patch16_224",
        "--set",
        f"model.weights={weights}",
        "--set",
        "features.stride=8",
    ]


def test_the_published_codes_masks_and_parts(data: Path, tmp_path: Path) -> None:
    golden = json.loads((data / "golden" / "cosegmentation.json").read_text())
    arrays = np.load(data / "golden" / "cosegmentation.npz")
    asked, store = golden["parts"], str(tmp_path / "store")
    manifest = tmp_path / "cows.jsonl"
    rows = [
        {"uri": str(data / file), "id": f"{number}.png", "label": "cow"} for number, file in enumerate(golden["images"])
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(len(rows)):
        height, width = arrays[f"mask_{number}_hw"]
        mask = np.unpackbits(arrays[f"mask_{number}"], count=height * width).reshape(height, width)
        labels = arrays[f"parts_{number}"].astype(int)
        for folder, values in (("masks", 255 * mask), ("parts", np.where(labels == 255, 0, labels + 1))):
            file = tmp_path / folder / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            original = Image.open(data / golden["images"][number]).size
            Image.fromarray(values.astype(np.uint8)).resize(original, Image.Resampling.NEAREST).save(file)
    dinoray("extract", str(manifest), store, *model(data), "--set", f"image.shorter_side={asked['load_size']}")
    settings = {
        "elbow": asked["elbow"],
        "saliency_threshold": asked["thresh"],
        "votes_percentage": asked["votes_percentage"],
        "sample_interval": asked["sample_interval"],
        "num_parts": asked["num_parts"],
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"cosegment.{key}={value}")]
    made = dinoray("cosegment", store, "cows", *overrides)
    assert (made["segmented"], made["noted"]) == (6, 0)
    foreground = dinoray("evaluate", "segmentation", store, "cows", "--masks", str(tmp_path / "masks"))
    assert foreground["images"] == 6 and foreground["jaccard"] >= 0.95
    found = dinoray("evaluate", "parts", store, "cows", "--annotations", str(tmp_path / "parts"))
    assert found["images"] == 6 and found["nmi"] >= 0.9 and found["ari"] >= 0.9


def test_msrc_cows(data: Path, tmp_path: Path) -> None:
    """30 photos as the published code was run on them: Jaccard 0.734, precision 0.929 on the same weights."""
    store = str(tmp_path / "store")
    dinoray("extract", str(data / "msrc-cow" / "images"), store, *model(data))
    dinoray("cosegment", store, "cows", "--sets", "directory", "--set", "cosegment.num_parts=1")
    found = dinoray("evaluate", "segmentation", store, "cows", "--masks", str(data / "msrc-cow" / "masks"))
    assert (found["images"], found["without_truth"]) == (30, 0)
    assert found["jaccard"] >= 0.7335, found
    assert found["precision"] >= 0.9285


def test_killed_and_run_again(tmp_path: Path) -> None:
    """The driver and all its workers, at any moment after the first commit: no image twice, none missing."""
    spec = ("model.name=vit_tiny_patch16_224", "model.weights=random", "image.native=true")
    store = Store.create(str(tmp_path / "store"), load_config([], list(spec)))
    sizes = {f"set{number}": 3 + 7 * (number % 4) for number in range(12)}
    images = [f"{name}/{at}.png" for name, size in sizes.items() for at in range(size)]
    add_scenes(store, 1, {image: scene(number) for number, image in enumerate(images)}, tmp_path)
    asked = [
        "cosegment",
        store.uri,
        "things",
        "--set",
        "run.commit_seconds=0.01",
        "--set",
        "cosegment.sample_interval=3",
    ]
    command = [str(Path(sys.executable).with_name("dinoray")), *asked]
    log = tmp_path / "store" / "parts" / "things" / "images" / "_delta_log"
    for round_ in range(2):
        before = len(list(log.glob("*.json"))) if log.is_dir() else 1
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (log.is_dir() and len(list(log.glob("*.json"))) > before + round_) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in [process.pid, *(child.pid for child in left)]:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()
        rows = DeltaTable(str(log.parent)).to_pyarrow_table(columns=["set_id", "image_id"]).num_rows
        assert rows < len(images), "it was done before it could be killed"
    result = dinoray(*asked)
    assert result["segmented"] + result["already_done"] == len(images)
    rows = DeltaTable(str(log.parent)).to_pyarrow_table(columns=["set_id", "image_id"]).to_pylist()
    assert sorted(row["image_id"] for row in rows) == sorted(images)
    assert all(row["image_id"].startswith(f"{row['set_id']}/") for row in rows)
    tables = PartTables.open_existing(store.uri, "things", {})
    assert tables and list(disagreements(tables)) == []
    assert dinoray(*asked)["segmented"] == 0
