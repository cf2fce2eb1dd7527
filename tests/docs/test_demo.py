"""`make demo` does what it says."""

from __future__ import annotations

from pathlib import Path

from pipelines.settings.loading import load_config
from pipelines.store.store import Store


def test_the_demo_says_where_its_results_are_and_answers_a_query(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for table in ("images", "patches"):
        assert f"demo/store/{table}" in printed and (folder / "demo" / "store" / table).is_dir()
    assert "15 photographs, 0 failures" in printed and "animal/chelsea.png" in printed


def test_the_demo_says_what_it_used_instead_of_the_hub(demo: tuple[Path, str]) -> None:
    first, second, *_ = demo[1].splitlines()
    assert first.startswith("The model hub cannot be reached") and "HF_HUB_OFFLINE is set" in first
    store = Store.open(str(demo[0] / "demo" / "store"), load_config())
    command = f"$ dinoray extract {Path('demo') / 'photos'} {Path('demo') / 'store'}"
    assert second.startswith("Going on with dinoray_tiny: a small ViT-Ti/16") and "not for real work" in second
    assert store.spec["model"]["name"] == "dinoray_tiny"
    assert f"{command} --set model.name=dinoray_tiny" in demo[1]
