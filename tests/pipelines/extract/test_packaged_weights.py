"""Weights that come with dinoray: in a store's spec by their content, the same on every worker, without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from packaged_files import WEIGHTS
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dino_ops import hub, packaged
from pipelines.cli import app
from pipelines.errors import JobError, RequestError
from pipelines.evaluate import classify
from pipelines.extract import job as extract
from pipelines.features.same_features import spec_with_weights
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config
from pipelines.store.store import Store
from pipelines.store.weights import checked, identity


def tiny(*overrides: str) -> Config:
    return load_config([], ["model.name=dinoray_tiny", *overrides])


@pytest.fixture
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Let this process have dinoray as of another version. Nothing here reads its weights, so any content will do."""

    def install(version: int) -> Path:
        path = tmp_path / f"version {version}" / WEIGHTS.name
        monkeypatch.setattr(packaged, "FOLDER", path.parent)
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.parent.name)
        return path

    return install


def test_identity_is_the_content(versions: Callable[[int], Path], tmp_path: Path) -> None:
    first = versions(1)
    found = identity(tiny())
    assert found == f"sha256:{hashlib.sha256(first.read_bytes()).hexdigest()}"
    assert identity(tiny(f"model.weights={first}")) == found
    versions(2)
    assert identity(tiny()) != found
    assert identity(tiny("model.weights=random")) == "random:0"
    assert identity(load_config([], ["model.name=dino_vits8"])) == "pretrained"


def test_a_worker_opens_the_file_that_the_driver_saw(versions: Callable[[int], Path]) -> None:
    first = versions(1)
    seen = identity(tiny())
    assert checked(tiny(), seen) == str(first)
    versions(2)
    with pytest.raises(JobError, match=r"weights of dinoray_tiny that come with dinoray .* install the same dinoray"):
        checked(tiny(), seen)


def test_weights_of_two_versions_do_not_mix_in_a_store(versions: Callable[[int], Path], tmp_path: Path) -> None:
    first, uri = versions(1), str(tmp_path / "store")
    store = Store.create(uri, tiny())
    assert Store.open_existing(uri, tiny()) is not None
    compared = spec_with_weights(store, load_config([], []), "A picture to search with")
    assert (compared.model.name, compared.model.weights) == ("dinoray_tiny", "pretrained")
    assert identity(compared) == store.spec["model"]["weights"]
    versions(2)
    with pytest.raises(RequestError, match=r"made with another spec \(model\.weights: the store has"):
        Store.open_existing(uri, tiny())
    with pytest.raises(RequestError, match=r"other weights .* of dinoray_tiny that come with this dinoray"):
        spec_with_weights(store, load_config([], []), "A picture to search with")
    asked = load_config([], [f"model.weights={first}"])
    assert spec_with_weights(store, asked, "A picture to search with").model.weights == str(first)


def test_an_installation_without_the_weights(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "nothing")
    store = tmp_path / "store"
    asked = ["extract", str(photos(2)), str(store), "--set", "model.name=dinoray_tiny"]
    result = CliRunner().invoke(app, asked)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "lacks the weights of dinoray_tiny" in line
    assert not store.exists()


@pytest.mark.usefixtures("ray")
def test_features_without_a_network(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings in the store are those of timm's network with the tensors of the file, to half precision."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    folder, config = photos(2), tiny("image.size=[224, 224]", "image.resample=bicubic", "run.workers=1")
    result = extract.run(config, input=str(folder), store=str(tmp_path / "store"))
    assert (result.extracted, result.failed) == (2, 0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    rows = Store.open(str(tmp_path / "store"), config).images.read(["image_id", "embedding"]).to_pylist()
    for row in rows:
        picture = Image.open(folder / row["image_id"]).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        values = (np.asarray(picture) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        pixels = torch.from_numpy(values.transpose(2, 0, 1)[None].astype(np.float32))
        with torch.no_grad():
            expected = network.forward_features(pixels)[0, 0].numpy()
        found = np.array(row["embedding"])
        assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_photos_of_a_kind_are_nearer_than_with_random_weights(data: Path, tmp_path: Path) -> None:
    """500 photos that it was not trained on, each classified by the others."""
    accuracy = {}
    for weights in ("pretrained", "random"):
        asked = ("store.patches=none", "evaluate.neighbours=[10]", "image.shorter_side=96")
        config = tiny(f"model.weights={weights}", *asked)
        store = str(tmp_path / weights)
        assert extract.run(config, input=str(data / "imagenette" / "val"), store=store).extracted == 500
        accuracy[weights] = classify.run(config, task="knn", store=store).accuracy["10"]
    assert accuracy["pretrained"] > accuracy["random"] + 0.05, accuracy  # twice the standard error
