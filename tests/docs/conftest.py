"""What the documentation's code blocks work on: what the demo wrote, and a result of each job, all made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT

OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
RESULTS = """
store: demo/store
jobs:
  - cluster: {name: words, settings: {cluster: {k: 20}}}
  - correspond: {name: nearest, pairs: "knn:3"}
  - cosegment: {name: parts, settings: {cosegment: {refine: false}}}
"""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the demo ran, and what it printed, on a machine without a model hub."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, **OFFLINE, "HF_HOME": str(folder / "no-cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="session")
def documented(demo: tuple[Path, str]) -> Path:
    """The demo's folder with results of jobs, where `photos` and `features` are the demo's photos and store."""
    folder, _ = demo
    (folder / "photos").symlink_to(folder / "demo" / "photos")
    (folder / "features").symlink_to(folder / "demo" / "store")
    (folder / "results.yaml").write_text(RESULTS)
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "run", "results.yaml"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, **OFFLINE}
    )
    assert done.returncode == 0, done.stderr
    return folder
