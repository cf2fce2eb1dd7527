"""The README does what it says: its demo runs, and its queries run as shown on what the demo wrote."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.settings import sections as config
from pipelines.settings.pipeline_file import read_pipeline
from pipelines.store.store import Store

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the demo ran, and what it printed, on a machine without a model hub."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "no-cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_demo_says_where_its_results_are_and_answers_a_query(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for table in ("images", "patches"):
        assert f"demo/store/{table}" in printed and (folder / "demo" / "store" / table).is_dir()
    assert "15 photographs, 0 failures" in printed and "animal/chelsea.png" in printed


def test_the_demo_says_what_it_used_instead_of_the_hub(demo: tuple[Path, str]) -> None:
    first, second, *_ = demo[1].splitlines()
    assert first.startswith("The model hub cannot be reached") and "HF_HUB_OFFLINE is set" in first
    store = Store.open(str(demo[0] / "demo" / "store"), config.load_config())
    command = f"$ dinoray extract {Path('demo') / 'photos'} {Path('demo') / 'store'}"
    assert second.startswith("Going on with dinoray_tiny: a small ViT-Ti/16") and "not for real work" in second
    assert store.spec["model"]["name"] == "dinoray_tiny"
    assert f"{command} --set model.name=dinoray_tiny" in demo[1]


@pytest.mark.parametrize("number", range(3))
def test_queries_run_as_shown(demo: tuple[Path, str], number: int) -> None:
    queries = re.findall(r"```python\n(.*?)```", README.partition("## Queries")[2], flags=re.DOTALL)
    assert len(queries) == 3
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", queries[number]],
        cwd=demo[0], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("chelsea" in done.stdout) or ("animal" in done.stdout), done.stdout


def test_every_setting_that_documents_name_exists() -> None:
    """`section.key` in the README and the configurations is a setting, an option's value or a table's column."""
    known = {f"{section}.{key}" for section, about in config.Config.model_fields.items()
             for key in about.annotation.model_fields}  # fmt: skip
    sections = "|".join(config.Config.model_fields)
    named = set(re.findall(rf"`(?:--set )?((?:{sections})\.[a-z_]+)", README))
    named |= set(re.findall(rf"--set ((?:{sections})\.[a-z_]+)", README))
    assert len(named) > 10
    assert named - known - {"store.json"} == set()


def test_configurations_load() -> None:
    for file in (ROOT / "configs").glob("*.yaml"):
        if file.name == "nightly.yaml":  # a pipeline, with settings inside
            read_pipeline(file, {})
        else:
            config.load_config([file])
        assert file.read_text().splitlines()[2].startswith("#   dinoray "), f"{file.name} opens with its command"


def test_every_command_is_in_the_readme() -> None:
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert f"dinoray {command.callback.__name__}" in README
