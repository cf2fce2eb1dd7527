"""The notebook runs from its first cell to its last, in a kernel of its own, on a machine without a model hub."""

from __future__ import annotations

import ast
import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable
from PIL import Image
from repository import ROOT

FILE = ROOT / "examples" / "images-to-parts.ipynb"
PICTURES = 7  # photos, colours, saliency, foreground, parts, matches, masks


def test_its_cells_are_python_and_carry_no_results() -> None:
    """Results would be those of one machine's weights, and megabytes."""
    cells = json.loads(FILE.read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    for cell in codes:
        ast.parse("".join(cell["source"]))
        assert not cell["outputs"] and cell["execution_count"] is None
    assert len(codes) > PICTURES and cells[0]["source"][0].startswith("# From images to parts")


@pytest.mark.slow
def test_from_images_to_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs `make test-all`, which installs Jupyter's kernel")
    import nbformat

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # a `python3` that this user has registered is another Python
    notebook = nbformat.read(FILE, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    pictures = [np.asarray(found) for found in map(_picture, notebook.cells) if found is not None]
    assert len(pictures) == PICTURES and all(picture.std() > 5 for picture in pictures), "none is blank"
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "dinoray_tiny" in said and "6 photos extracted, 0 were done; 6 segmented" in said
    store = tmp_path / "notebook" / "store"
    assert (store / "report.html").stat().st_size > 50_000
    parts = DeltaTable(store / "parts" / "parts" / "patches").to_pyarrow_table()
    assert len(set(parts["part_id"].to_pylist())) == 5 and len(set(parts["image_id"].to_pylist())) == 6


def _picture(cell: Any) -> Image.Image | None:
    for output in cell.get("outputs", ()):
        if png := output.get("data", {}).get("image/png"):
            return Image.open(io.BytesIO(base64.b64decode(png)))
    return None
