"""`extract IN S` beside `extract IN S --prune`, by the real commands, over a store of thousands of images."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable
from PIL import Image
from small_runs import as_options
from stores import sound

HELD, GONE, NEW, ROUNDS = 4000, 308, 300, 20
OPTIONS = as_options("run.images_per_shard=25", "run.commit_seconds=0.2", "image.shorter_side=32")


def add_photos(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")


def started(source: Path, store: Path, *more: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("dinoray")), "extract", str(source), str(store), *OPTIONS, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_image_is_there_once(tmp_path: Path) -> None:
    add_photos(tmp_path / "before", range(HELD))
    first = started(tmp_path / "before", tmp_path / "held")
    assert first.wait(timeout=900) == 0, first.communicate()
    add_photos(tmp_path / "new", range(HELD, HELD + NEW))
    source, store = tmp_path / "in", tmp_path / "store"
    overlapping = 0
    for number in range(ROUNDS):
        chance = random.Random(number)
        shutil.copytree(tmp_path / "before", source, copy_function=os.link)
        for photo in chance.sample(sorted(source.iterdir()), GONE):
            photo.unlink()
        shutil.copytree(tmp_path / "new", source, copy_function=os.link, dirs_exist_ok=True)
        # the photographs are to be those of the store, which names them by where they are in INPUT
        shutil.copytree(tmp_path / "held", store)
        both = [started(source, store)]
        time.sleep(chance.uniform(0, 1))
        both.append(started(source, store, "--prune"))
        said = [run.communicate(timeout=600) for run in both]
        assert [run.returncode for run in both] == [0, 0], said
        wanted = Counter(photo.name for photo in source.iterdir())
        for table in ("images", "patches"):
            rows = DeltaTable(str(store / table)).to_pyarrow_table(columns=["image_id"])["image_id"].to_pylist()
            held = Counter(rows)
            assert held.keys() == wanted.keys(), table
            assert len(set(held.values())) == 1, f"{table}: {held.most_common(3)}"
        assert sound(store).problems == []
        overlapping += _interleaved(store)
        shutil.rmtree(source)
        shutil.rmtree(store)
    print(f"{ROUNDS} rounds, {overlapping} with commits of one between those of the other")
    assert overlapping >= ROUNDS / 5, "they hardly met"


def _interleaved(store: Path) -> bool:
    """Whether both runs changed the store, one between changes of the other."""
    history = DeltaTable(str(store / "images")).history()
    runs = [entry["run_id"] for entry in reversed(history) if "run_id" in entry][-200:]
    last = dict.fromkeys(runs)
    stretches = sum(earlier != later for earlier, later in itertools.pairwise(runs)) + 1
    return stretches > len(last)
