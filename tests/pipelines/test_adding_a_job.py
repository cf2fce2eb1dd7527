"""Adding a job touches its folder, its settings and one entry: the diff in docs/how-it-is-built.md is all it takes."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hand_made import add_images, source
from repository import ROOT
from small_runs import settings

from pipelines.jobs import JOBS
from pipelines.store.store import Store

PAGE = (ROOT / "docs" / "how-it-is-built.md").read_text()


def diff() -> str:
    (found,) = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with the example's job in it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("dino_ops", "pipelines", "dinoray"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (copy / "tests" / "support").mkdir(parents=True)
    shutil.copy2(ROOT / "tests" / "support" / "import_rule.py", copy / "tests" / "support")
    shutil.copy2(ROOT / "pyproject.toml", copy)
    (copy / "job.diff").write_text(diff())
    subprocess.run(["git", "apply", "job.diff"], cwd=copy, check=True, env={**os.environ, "GIT_DIR": "/nowhere"})
    return copy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(str(tmp_path / "store"), settings())
    rows = [
        source(f"{label}/{number}.jpg") | {"label": label} for label, number in [("cat", 1), ("cat", 2), ("dog", 1)]
    ]
    add_images(made, "20260101T000000Z-000000", rows)
    return made


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip


def test_the_diff_touches_nothing_else() -> None:
    touched = set(re.findall(r"^\+\+\+ b/(\S+)", diff(), flags=re.MULTILINE))
    new = {path for path in touched if path.startswith("pipelines/tally/")}
    assert touched - new == {"pipelines/jobs.py", "pipelines/settings/sections.py"} and new


@pytest.mark.parametrize("folder", ["pipeline", "running", "settings"])
def test_what_serves_all_jobs_names_none(folder: str) -> None:
    """What differs between jobs is in the table of jobs."""
    for path in (ROOT / "pipelines" / folder).glob("*.py"):
        tree = ast.parse(path.read_text())
        found = {(node.value, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not [(value, line) for value, line in found if value in JOBS], path


def test_the_command_line_knows_the_job(checkout: Path, store: Store) -> None:
    dinoray = ("-c", "from pipelines.cli import main; main()")
    helped = run(checkout, *dinoray, "tally", "--help")
    assert (
        helped.returncode == 0 and "How many images each label has." in helped.stdout and "--dry-run" in helped.stdout
    )
    done = run(checkout, *dinoray, "tally", store.uri, "labels", "--set", "tally.least=2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["labels"] == {"cat": 2}
    shown = run(checkout, *dinoray, "tally", store.uri, "labels")
    assert "images: 3" in shown.stdout, "without a printer of its own its counts are printed"
    missing = run(checkout, *dinoray, "tally", f"{store.uri}-none", "labels")
    assert missing.returncode == 2 and "There is no store" in missing.stderr


def test_pipelines_and_python_know_the_job(checkout: Path, store: Store, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"store: {store.uri}\njobs:\n- tally: {{name: labels, settings: {{tally: {{least: 2}}}}}}\n")
    program = (
        "import dinoray, sys;"
        "print([[job.status for job in dinoray.run(sys.argv[1]).jobs] for _ in range(2)]);"
        "print(dinoray.tally(sys.argv[2], 'labels', settings={'tally.least': 1}).labels)"
    )
    done = run(checkout, "-c", program, str(file), store.uri)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[['done'], ['unchanged']]", "{'cat': 2, 'dog': 1}"]


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("pipelines/tally/job.py", "", ""),
        ("pipelines/tally/job.py", "from pipelines.cluster import job", "pipelines.tally is not allowed to import"),
        ("pipelines/store/table.py", "from pipelines.tally import job", "pipelines.store is not allowed to import"),
        ("pipelines/storage/files.py", "import pipelines.running.cpus", "pipelines.storage is not allowed to import"),
        ("dino_ops/pca.py", "import pyarrow", "dino_ops is not allowed to import pyarrow"),
    ],
    ids=["nothing", "another job", "a job from below", "upward", "pyarrow from dino_ops"],
)
def test_the_rule_of_imports_holds_for_the_job(checkout: Path, file: str, line: str, broken: str) -> None:
    """Nobody told the rule of the new folder: it knows it from the table of jobs."""
    path = checkout / file
    before = path.read_text()
    path.write_text(f"{before}\n{line}\n")
    try:
        done = run(checkout, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache")
    finally:
        path.write_text(before)
    assert done.returncode == (1 if broken else 0), done.stdout + done.stderr
    assert broken in done.stdout
