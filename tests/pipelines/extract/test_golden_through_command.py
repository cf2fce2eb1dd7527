"""The published extractor's outputs, through `extract` into float32 tables, read back with DuckDB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from deltalake import DeltaTable

from dino_ops import binned_similarity
from pipelines.extract import job as extract
from pipelines.settings.loading import load_config

# cases that differ in layer and facet alone come out of one run, as further columns
RUNS: dict[str, tuple[list[str], dict[int, str]]] = {
    "stride 16": (
        ["features.extra=[{facet: query, layer: 11}, {facet: value, layer: 11}, {facet: token, layer: 11}, "
         "{facet: token, layer: 5}]"],
        {0: "descriptor", 1: "descriptor_query11", 2: "descriptor_value11", 3: "descriptor_token11",
         4: "descriptor_token5"},
    ),
    "stride 8": (["features.stride=8", "features.layer=9"], {5: "descriptor", 6: "descriptor"}),
    "small": (["features.stride=4", "image.shorter_side=112"], {7: "descriptor"}),
    "native": (["features.stride=8", "features.layer=9", "image.size=native"], {8: "descriptor"}),
    "fixed": (["image.size=[224, 320]"], {9: "descriptor"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def golden(data: Path) -> dict[str, Any]:
    return json.loads((data / "golden" / "descriptors.json").read_text())


@pytest.fixture(scope="module")
def arrays(data: Path) -> Any:
    return np.load(data / "golden" / "descriptors.npz")


LONG = ("native", "stride 8")  # tests/dino_ops holds the extractor to all of them
ON_RAY = "stride 16"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in RUNS])
def test_stored_values_equal_the_published_ones(
    name: str, golden: dict[str, Any], arrays: Any, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("ray" if name == ON_RAY else "extract_here")
    overrides, columns = RUNS[name]
    manifest = tmp_path / "golden.jsonl"
    rows = [{"uri": str(data / file), "id": str(index)} for index, file in enumerate(golden["images"])]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        [],
        [
            *("model.name=deit_tiny_patch16_224", f"model.weights={data / 'weights' / golden['weights']}"),
            *("store.dtype=float32", "features.position=dino", "features.channel_order=dim_major"),
            *overrides,
        ],
    )
    result = extract.run(config, input=str(manifest), store=str(tmp_path / "store"))
    assert (result.extracted, result.failed) == (4, 0)
    images = DeltaTable(tmp_path / "store" / "images").to_pyarrow_dataset()
    patches = DeltaTable(tmp_path / "store" / "patches").to_pyarrow_dataset()
    connection = duckdb.connect()
    connection.register("images", images)
    connection.register("patches", patches)
    maps: dict[tuple[int, str], np.ndarray] = {}
    for entry in (entry for entry in golden["cases"] if entry["case"] in columns):
        case, image = entry["case"], entry["image"]
        facts = connection.sql(
            "select grid_height, grid_width, model_height, model_width, embedding from images "
            f"where image_id = '{image}'"
        ).fetchall()[0]
        assert [*facts[:2]] == entry["grid"] and [*facts[2:4]] == entry["input_hw"]
        table = connection.sql(
            f"select {columns[case]} as d, saliency from patches where image_id = '{image}' order by row, col"
        ).to_arrow_table()
        found = np.array(table["d"].to_pylist(), np.float32)
        maps[image, columns[case]] = found.reshape(*entry["grid"], -1)
        prefix = f"{case}_{image}"
        if not entry["settings"]["bin"]:
            expected = arrays[f"{prefix}_descriptor"]
            picked = found[arrays[f"{prefix}_index"]]
            assert np.linalg.norm(picked - expected) <= 1e-3 * np.linalg.norm(expected)
        np.testing.assert_allclose(table["saliency"].to_numpy(), arrays[f"{prefix}_saliency"], atol=1e-3)
        if name == "stride 16":
            np.testing.assert_allclose(facts[4], arrays[f"embedding_{image}"], atol=1e-3)
    if 6 in columns:  # the binned case, from stored descriptors through the two-matrix similarity
        a, b = (arrays[f"6_{image}_descriptor"] for image in (0, 1))
        expected = (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        ours = binned_similarity(maps[0, "descriptor"], maps[1, "descriptor"])
        np.testing.assert_allclose(ours[np.ix_(arrays["6_0_index"], arrays["6_1_index"])], expected, atol=1e-4)
