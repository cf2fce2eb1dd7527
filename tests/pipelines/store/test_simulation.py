"""Jobs that are killed and paused at every step, while others run (tests/support/simulation.py).

    python -m benchmarks.simulation

runs all of it and prints how much that was. `make soak` takes random walks for SOAK_WALK_MINUTES (SOAK_MINUTES), the
first one of SOAK_SEED.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from simulated_jobs import JOBS

SUPPORT = Path(__file__).parents[2] / "support"
PAIRS_ON_S3 = (
    ("cluster --update", "extract changed"),
    ("compact", "extract changed"),
    ("index update", "index update"),
)
WALK_MINUTES = float(os.environ.get("SOAK_WALK_MINUTES") or os.environ.get("SOAK_MINUTES", "1"))


def simulated(folder: Path, *options: str, seconds: float) -> dict[str, Any]:
    """What the simulation printed, which found nothing wrong."""
    paths = [str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "simulation.py"), str(folder), *options],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["wrong"] == []
    return found["counts"]


def test_an_update_is_paused_while_images_are_extracted_again(tmp_path: Path) -> None:
    options = ("--jobs", "cluster --update", "--others", "extract changed", "--only", "pauses")
    counts = simulated(tmp_path, *options, seconds=300)
    assert counts["pauses"] >= 15 and counts["again"] >= 5


def test_an_extraction_is_killed(tmp_path: Path) -> None:
    assert (
        simulated(tmp_path, "--jobs", "extract changed", "--others", "", "--only", "kills", seconds=300)["kills"] > 10
    )


def test_two_walks(tmp_path: Path) -> None:
    jobs = "extract new,cluster --update,index update"
    counts = simulated(tmp_path, "--jobs", jobs, "--walks", "2", "--seed", "1", seconds=300)
    assert counts["walks"] == 2 and counts["killed in walks"] and counts["paused in walks"]


@pytest.mark.slow
@pytest.mark.timeout(60 * WALK_MINUTES + 600)
def test_walks_for_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))
    with capsys.disabled():
        print(f"\nwalks: SOAK_SEED={seed}", flush=True)
    options = ("--minutes", str(WALK_MINUTES), "--seed", str(seed))
    counts = simulated(tmp_path, *options, seconds=60 * WALK_MINUTES + 500)
    with capsys.disabled():
        print("".join(f"{what:28}{count:8,}\n" for what, count in sorted(counts.items())), flush=True)
    assert counts["walks"] and counts["killed in walks"] + counts["paused in walks"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_beside_all_others(tmp_path: Path, job: str) -> None:
    counts = simulated(tmp_path, "--jobs", job, seconds=3600)
    assert counts["kills"] > 100 and counts["pauses"] > 100 and counts["pairs"] >= 11


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("job", "other"), PAIRS_ON_S3)
def test_jobs_on_a_real_server(tmp_path: Path, job: str, other: str) -> None:
    counts = simulated(tmp_path, "--jobs", job, "--others", other, "--s3", seconds=3600)
    assert counts["kills"] > 20 and counts["pauses"] > 10
