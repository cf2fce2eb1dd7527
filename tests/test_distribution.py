"""The wheel and the sdist: all that dinoray needs is in them, and the wheel works where nothing else of it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from repository import ROOT

NEEDED = {
    "dinoray/__init__.py",
    "dinoray/py.typed",
    "dinoray/__init__.pyi",
    "dino_ops/py.typed",
    "pipelines/py.typed",
    "pipelines/report/page/report.html",
    "pipelines/store/store.py",
    "dino_ops/pretrained/dinoray_tiny.safetensors",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, built from what git knows, without reaching for anything on the network."""
    copy, built = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("built")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    program = (
        "import setuptools.build_meta as build, sys;"
        "folder = sys.argv[1];"  # which a build changes
        "build.build_sdist(folder), build.build_wheel(folder)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(built)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


def test_both_hold_everything(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert in_wheel >= NEEDED
    assert not {name for name in in_wheel if name.startswith(("tests/", "benchmarks/", "docs/", "examples/"))}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert in_sdist >= NEEDED | {"pyproject.toml", "README.md", "LICENSE"}


def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """Installed without dependencies, which are those of this environment, and used from another folder."""
    (wheel,) = built.glob("*.whl")
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", f"--target={site}", str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(ours))
    program = (
        "import dinoray, pipelines, dino_ops, sys;"
        "print(dinoray.__version__, dinoray.__file__, pipelines.__file__, dino_ops.__file__);"
        "from pipelines.report import page; from pipelines import cli;"
        "sys.argv = ['dinoray', '--version']; cli.main()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, version = done.stdout.splitlines()
    assert all(str(site) in place for place in first.split()[1:]), first
    assert version == f"dinoray {dinoray_version()}"


def dinoray_version() -> str:
    from importlib import metadata

    return metadata.version("dinoray")
