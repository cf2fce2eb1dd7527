"""Jobs killed and paused at every step beside each other: how much of it was done, and what was lost, twice or wrong.

    python -m benchmarks.simulation                          (all jobs, an hour or two on an idle machine; in memory)
    python -m benchmarks.simulation --jobs "compact,prune"   (some of them, beside all)
    python -m benchmarks.simulation --minutes 60 --seed 1    (random walks of three and four jobs)
    python -m benchmarks.simulation --s3 --jobs compact --others "extract changed"
    python -m benchmarks.simulation --found FILE ...         (only append what simulations have printed before)

What is simulated stands in tests/support/simulation.py, which this runs; the other options are its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.results import Row, report

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "support" / "simulation.py"
IN_MEMORY = Path("/dev/shm")
WRONG = ("lost", "twice", "wrong", "stuck", "unsound", "leftovers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--found", type=Path, nargs="*", help="files with what simulations printed")
    asked, options = parser.parse_known_args()
    began = time.monotonic()
    found = [json.loads(path.read_text()) for path in asked.found or ()] or [simulate(options)]
    place = "a real S3 server" if "--s3" in options else "a local disk"
    figures = f"{time.monotonic() - began:,.0f} s" if not asked.found else ""
    report(f"jobs killed and paused at every step, on {place}", rows(found, figures))
    for one in found:
        print(*one["wrong"], sep="\n")


def simulate(options: list[str]) -> dict[str, Any]:
    """Run the simulation with some options of its own; what it prints."""
    paths = [str(ROOT), str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        printed = subprocess.run(
            [sys.executable, str(PROGRAM), folder, *options],
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        ).stdout
    parsed: dict[str, Any] = json.loads(printed)
    return parsed


def rows(found: list[dict[str, Any]], figures: str) -> list[Row]:
    """found: what simulations of different jobs printed."""
    counts = sum((Counter(one["counts"]) for one in found), Counter[str]())
    steps = {job: number for one in found for job, number in one["steps"].items()}
    wrong = {name: counts[name] for name in WRONG}
    said = ", ".join(f"{name} {count}" for name, count in wrong.items())
    walked = (
        f"{counts['jobs of walks']} jobs, {counts['killed in walks']} of them killed, {counts['paused in walks']} "
        "paused while all the following ones ran"
    )
    return [
        Row("jobs", len(steps), "", ", ".join(f"{job}: {number} steps" for job, number in steps.items())),
        Row("kills, each followed by the same command, most by another one first", counts["kills"], "", figures),
        Row("pauses, in each of which another job ran whole", counts["pauses"], "", f"{counts['pairs']} pairs of jobs"),
        Row("random walks of three and four jobs", counts["walks"], "", walked),
        Row("stores swept without retention afterwards", counts["swept"], "", ""),
        Row("said to run the command again", counts["again"], "", f"{counts['untold']} of them by a traceback"),
        Row("anything else than one job after the other", sum(wrong.values()), "<= 0", said),
    ]


if __name__ == "__main__":
    main()
