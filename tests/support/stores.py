"""Comparing stores: what is in them, regardless of who wrote it and in how many files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from small_runs import settings

from pipelines.store.vectors import decode
from pipelines.upkeep import verify


def sound(store: Path) -> verify.Result:
    """What verify found in a store that has nothing wrong."""
    result = verify.run(settings(), store=str(store))
    assert result.problems == []
    return result


def descriptors(store: Path, column: str = "descriptor") -> dict[str, np.ndarray]:
    """image_id -> (patches, D), in raster order."""
    table = sorted_patches(store)
    vectors, ids = decode(table, column), np.array(table["image_id"].to_pylist())
    return {image_id: vectors[ids == image_id] for image_id in dict.fromkeys(ids)}


def sorted_patches(store: Path) -> pa.Table:
    """All patches rows, by image and in raster order."""
    table = DeltaTable(store / "patches").to_pyarrow_table().combine_chunks()
    return table.sort_by([("image_id", "ascending"), ("row", "ascending"), ("col", "ascending")])


def assert_same(store: Path, expected: Path, *, versions: bool = True) -> None:
    """Both stores are sound and hold the same images, failures and patches, once each.

    Who wrote a row and when may differ, and without `versions` where the files are and when they were written. So may
    the last bits of values: a matrix product rounds differently in batches of other sizes.
    """
    sound(store)
    facts = ["image_id", "label", "width", "height", "grid_width"]
    of_failures = ["image_id", "stage", "error"]
    if versions:
        facts += ["uri", "source_size", "source_version"]
        of_failures += ["source_version"]
    for table, columns in (("images", facts), ("failures", of_failures)):
        ours, theirs = (_rows(one / table, columns) for one in (store, expected))
        assert ours == theirs
    left, right = sorted_patches(store), sorted_patches(expected)
    for column in ("image_id", "row", "col", "y", "x"):
        assert left[column].equals(right[column]), column
    np.testing.assert_allclose(left["saliency"].to_numpy(), right["saliency"].to_numpy(), atol=1e-3)
    np.testing.assert_allclose(decode(left, "descriptor"), decode(right, "descriptor"), atol=2e-3)


def _rows(table: Path, columns: list[str]) -> list[dict[str, object]]:
    return sorted(DeltaTable(table).to_pyarrow_table(columns=columns).to_pylist(), key=lambda row: str(row["image_id"]))
