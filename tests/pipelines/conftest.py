"""Fixtures of the pipeline tests: real data, generated photos, one Ray for the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from repository import ROOT
from s3_server import S3Server, ServerUnavailable, s3_server
from small_runs import photo


@pytest.fixture(scope="session")
def data() -> Path:
    """Real images, weights and golden outputs."""
    here = Path(os.environ.get("DINORAY_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not here.is_dir():
        pytest.skip(f"no test data at {here} (set DINORAY_TEST_DATA)")
    return here


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One local Ray for all tests that run the job in this process."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",  # without it Ray joins a cluster that somebody started on this machine
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def extract_here() -> Iterator[None]:
    """extract without Ray, for what does not depend on it."""
    from extraction_here import extraction_here

    with extraction_here():
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on loopback, with one bucket."""
    try:
        with s3_server(tmp_path_factory.mktemp("s3")) as server:
            yield server
    except ServerUnavailable as error:
        pytest.skip(f"no S3 server: {error}")


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of generated photos: two labels, two shapes."""

    def make(count: int, name: str = "photos") -> Path:
        folder = tmp_path / name
        for index in range(count):
            shape = (96, 72) if index % 3 else (72, 96)
            target = folder / ("cat" if index % 2 else "dog") / f"{index:04d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            photo(index, *shape).save(target, quality=92)
        return folder

    return make
