"""estimate: what an extraction takes, said before and held against what it then took."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import as_options, settings
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from dino_ops.models import create_model
from pipelines.cli import app
from pipelines.errors import RequestError
from pipelines.extract import estimate
from pipelines.extract import job as extract
from pipelines.extract.layout import model_facts
from pipelines.store.projection import SAMPLE_IMAGES, images_to_fit
from pipelines.store.store import Store


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_bytes_are_those_of_the_real_run(tmp_path: Path, photos: Callable[..., Path], ray: None, dtype: str) -> None:
    config = settings(f"store.dtype={dtype}")
    folder, store = photos(90), tmp_path / "store"
    said = estimate.run(config, input=str(folder), store=str(store), sample=40)
    assert not store.exists()
    extract.run(config, input=str(folder), store=str(store))
    opened = Store.open(str(store), config)
    for name, table in (("images", opened.images), ("patches", opened.patches)):
        taken = sum(file.size for file in table.files().values())
        assert said.bytes[name] == pytest.approx(taken, rel=0.2)
    assert said.images == said.listed == 90 and said.sample == 40 and said.failed == 0
    assert said.source_bytes == sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    assert said.patches == pytest.approx(sum(file.rows for file in opened.patches.files().values()), rel=0.01)
    assert said.images_per_second > 0 and said.start_seconds > 0
    assert said.hours == pytest.approx((said.start_seconds + 90 / said.images_per_second) / 3600, rel=0.01)

    again = estimate.run(config, input=str(folder), store=str(store))
    assert again.images == 0 and "nothing to extract" in again.messages[0]


def test_images_that_a_pca_is_fitted_on_pass_the_model_once_more() -> None:
    fitted, plain = settings("store.pca=4"), settings()
    assert [images_to_fit(fitted, images) for images in (0, 100, 10_000)] == [0, 100, SAMPLE_IMAGES]
    assert images_to_fit(plain, 10_000) == 0


def test_flops_are_those_that_torch_counts() -> None:
    facts = model_facts(settings())
    backbone = create_model("vit_tiny_patch16_224", "random")
    for block in backbone.blocks:
        block.attn.fused_attn = False  # torch does not count the fused one on a CPU
    pixels = torch.zeros(1, 3, 224, 288)
    with FlopCounterMode(display=False) as counter:
        backbone.class_tokens(pixels)
    assert facts.gflop_of(14 * 18) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.05)


def test_a_named_device_and_its_cost(tmp_path: Path, photos: Callable[..., Path], extract_here: None) -> None:
    command = ["estimate", str(photos(8)), str(tmp_path / "store"), *as_options()]
    told = CliRunner().invoke(app, [*command, "--device", "t4", "--cpus", "1", "--price", "2", "--json"])
    assert told.exit_code == 0, told.stderr
    said = json.loads(told.stdout)
    assert said["named_limited_by"] == "decoding" and said["named_images_per_second"] == 250
    assert said["cost_per_million"] == pytest.approx(2 * 1e6 / 250 / 3600, rel=0.05)
    assert "raise --sample" in said["messages"][0]
    assert not (tmp_path / "store").exists()


def test_an_unknown_device_is_answered_with_the_known_ones(tmp_path: Path, photos: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match="no device 'abacus': choose one of"):
        estimate.run(settings(), input=str(photos(2)), store=str(tmp_path / "s"), device="abacus")


@pytest.mark.slow
def test_a_sample_without_a_readable_image_says_why(tmp_path: Path, extract_here: None) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(RequestError, match="None of 1 sampled image "):
        estimate.run(settings(), input=str(tmp_path / "in"), store=str(tmp_path / "s"))
