"""Features of further pictures are those that the store would hold of them, or it is said why they cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable
from hand_made import described, source
from small_runs import settings

from dino_ops.pca import PCA, fit_pca
from pipelines.errors import RequestError
from pipelines.extract.shards import ShardWriter
from pipelines.features.same_features import spec_with_weights, stored_form
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.store import Store
from pipelines.store.vectors import decode

GRID, DIMENSIONS = (3, 5), 16


@pytest.mark.parametrize("projected", [False, True], ids=["all dimensions", "store.pca"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_vectors_are_those_that_a_store_gives_back(tmp_path: Path, dtype: str, projected: bool) -> None:
    made = described(np.random.default_rng(0).standard_normal((*GRID, DIMENSIONS)).astype(np.float32))
    fitted = fit_pca(np.random.default_rng(1).standard_normal((50, DIMENSIONS)), 4) if projected else None
    store = Store.create(str(tmp_path), settings(f"store.dtype={dtype}", *(["store.pca=4"] if projected else [])))
    projections: dict[str, PCA] = {"descriptor": fitted} if fitted else {}
    writer = ShardWriter(store.uri, store.config, "r1", projections)
    writer.add(source("a"), made)
    patches, images = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    Committer(store, "r1", set()).commit([report], {"a": (10, "v1")})
    rows = DeltaTable(tmp_path / "patches").to_pyarrow_table().sort_by([("row", "ascending"), ("col", "ascending")])
    stored = decode(rows.combine_chunks(), "descriptor")

    found = stored_form(made, "descriptor", dtype, fitted)

    assert found.shape == (*GRID, 4 if projected else DIMENSIONS) and found.dtype == np.float32
    np.testing.assert_array_equal(found.reshape(len(stored), -1), stored)
    if dtype != "float32":
        exact = stored_form(made, "descriptor", "float32", fitted)
        assert 0 < np.abs(found - exact).max() < 0.05, "it is rounded as the store rounds"


def weights_file(folder: Path, content: bytes) -> str:
    path = folder / f"{content.decode()}.pth"
    path.write_bytes(content)
    return str(path)


def test_the_spec_is_the_stores_and_the_device_is_that_of_the_request(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"), settings("features.stride=8", "image.shorter_side=96"))
    asked = settings("model.device=cpu", "model.compile=true", "features.stride=4", "model.weights=pretrained")
    found = spec_with_weights(store, asked, "A picture")
    assert (found.features.stride, found.image.shorter_side) == (8, 96)
    assert (found.model.weights, found.model.device, found.model.compile) == ("random", "cpu", True)


def test_a_weights_file_is_given_again_and_has_to_be_the_same(tmp_path: Path) -> None:
    first, other = (weights_file(tmp_path, content) for content in (b"one", b"other"))
    store = Store.create(str(tmp_path / "store"), settings(f"model.weights={first}"))
    moved = str(Path(first).rename(tmp_path / "moved.pth"))
    assert spec_with_weights(store, settings(f"model.weights={moved}"), "A picture").model.weights == moved
    with pytest.raises(RequestError, match=r"other\.pth .* are not those of the store .*: give the same file"):
        spec_with_weights(store, settings(f"model.weights={other}"), "A picture")
    with pytest.raises(RequestError, match=r"^A picture needs the model, .* weights file .*give it again"):
        spec_with_weights(store, settings(), "A picture")


def test_weights_that_come_with_dinoray_may_have_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = settings("model.name=dinoray_tiny", "model.weights=pretrained")
    store = Store.create(str(tmp_path / "store"), tiny)
    assert spec_with_weights(store, tiny, "A picture").model.weights == "pretrained"
    newer = weights_file(tmp_path, b"newer")
    monkeypatch.setattr("pipelines.store.weights.packaged_weights", lambda name: Path(newer))
    with pytest.raises(RequestError, match=r"^A picture needs the model, .* other weights .*dinoray_tiny that come"):
        spec_with_weights(store, tiny, "A picture")
