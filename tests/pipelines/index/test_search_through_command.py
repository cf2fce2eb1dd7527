"""extract, index and search through the command, with a small model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import as_options
from typer.testing import CliRunner

from pipelines.cli import app


def dinoray(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.usefixtures("ray")
def test_a_photo_from_elsewhere_finds_its_copy_and_its_parts(photos: Callable[..., Path], tmp_path: Path) -> None:
    source, store = photos(6), tmp_path / "store"
    dinoray("extract", source, store, *as_options("store.pca=16", "features.stride=8"))
    query = shutil.copy(source / "cat" / "0003.jpg", tmp_path / "elsewhere.jpg")
    for of in ("embeddings", "pooled", "patches"):
        made = dinoray("index", store, of, "--set", f"index.of={of}")
        assert (made["kind"], made["images"], made["added"]) == ("flat", 6, 6)
        assert made["dimension"] == (192 if of == "embeddings" else 16)
    for of in ("embeddings", "pooled"):
        best = dinoray("search", store, of, query, "--top", 3)["results"]
        assert len(best) == 3 and best[0]["image_id"] == "cat/0003.jpg" and best[0]["label"] == "cat"
        assert best[0]["similarity"] == pytest.approx(1, abs=1e-3)

    picture = tmp_path / "found.png"
    result = dinoray("search", store, "patches", query, "--box", "0,0,30,30", "--top", 4, "--save", picture)
    assert all(row["image_id"] == "cat/0003.jpg" and row["similarity"] > 0.99 for row in result["results"])
    assert all(row["y"] < 30 and row["x"] < 30 for row in result["results"])
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and drawn.width > 400
        assert (255, 0, 0) in {colour for _, colour in drawn.getcolors(1 << 24) or []}

    shown = CliRunner().invoke(app, ["search", str(store), "embeddings", "cat/0003.jpg"])
    assert shown.exit_code == 0 and "similarity" in shown.stdout and "cat/0003.jpg" not in shown.stdout
