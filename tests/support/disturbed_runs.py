"""Runs of extract as processes of their own, what disturbs them, and how their stores are judged afterwards."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from deltalake import DeltaTable
from s3_server import S3Server
from small_runs import as_options, photo
from stores import assert_same

# many small shards and commits, so that there is always something half done
OPTIONS = (
    *("run.workers=2", "run.images_per_shard=3", "run.commit_seconds=0.2", "image.shorter_side=96"),
    "run.max_failed_fraction=1",  # the broken photo may be among the last few that a continued run has left
)
RUN_TIMEOUT_SECONDS = 300
# The resources of one node of a local cluster.
NODE = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
# Ray gives a local one 30 s to start, which is not much on a busy machine.
RAY_START_ATTEMPTS = 3
# How many were started and completed, in all tests together.
RUNS: Counter[str] = Counter()
# Storage that fails lets everything through within this many runs.
ATTEMPTS = 8


@dataclass
class Place:
    """An INPUT and a STORE: folders, or prefixes of a bucket. server: the bucket's, as the run sees it."""

    source: str
    store: str
    server: S3Server | None = None
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    with_ray: bool = True

    @property
    def command(self) -> list[str]:
        program = [str(Path(sys.executable).with_name("dinoray"))]
        if not self.with_ray:
            program = [sys.executable, str(Path(__file__).with_name("without_ray.py"))]
        return [*program, "extract", self.source, self.store, "--json", *as_options(*OPTIONS, *self.overrides)]

    @property
    def variables(self) -> dict[str, str]:
        usual = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_ADDRESS"))}
        return usual | (self.server.environment if self.server else {}) | self.environment


@contextmanager
def started(place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """A running extract in a process group of its own; whatever is left of it is killed in the end."""
    process = subprocess.Popen(
        place.command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=place.variables,
    )
    RUNS["started"] += 1
    try:
        yield process
        RUNS["completed"] += process.poll() == 0
    finally:
        for left in [process.pid, *(child.pid for child in children(process.pid))]:
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(pid: int) -> list[psutil.Process]:
    """The model workers of a run."""
    found = []
    for child in children(pid):
        with suppress(psutil.NoSuchProcess):
            found += [child] if "FusedWorker" in " ".join(child.cmdline()) else []
    return found


def commits(store: Path, table: str) -> int:
    """Versions in a table's log, beyond its creation."""
    return max(0, len(list((store / table / "_delta_log").glob("*.json"))) - 1)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until it happened, looking as often as possible; fails when the run ends before."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@dataclass(frozen=True)
class Ended:
    """How a run ended. result: the JSON that it printed."""

    code: int
    result: dict[str, Any]
    error: str


def run(place: Place) -> Ended:
    """A run to its end, which must be a result or one sentence, whatever disturbs it."""
    for _ in range(RAY_START_ATTEMPTS):
        done = subprocess.run(
            place.command, capture_output=True, text=True, timeout=RUN_TIMEOUT_SECONDS, env=place.variables
        )
        if "A local Ray could not be started" not in done.stderr:
            break
    RUNS["started"] += 1
    RUNS["completed"] += done.returncode == 0
    ended = (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and done.returncode in (0, 1) and done.stdout, ended
    result = json.loads(done.stdout)
    if done.returncode == 1:
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("dinoray: ")]
        assert len(line) > 30, line
    return Ended(done.returncode, result, done.stderr)


def finish(place: Place, attempts: int = 1) -> int:
    """The same command until a run ends well with nothing left to try; how many runs that took."""
    for attempt in range(1, attempts + 1):
        ended = run(place)
        if ended.code == 0 and not any("StorageError" in why for why in ended.result["failures_by_reason"]):
            return attempt
    raise AssertionError(f"not done after {attempts} runs: {ended}")


def lost_and_twice(store: Path, expected: Path) -> tuple[int, int]:
    """Images that are neither in images nor in failures, and rows too many."""
    found: Counter[str] = Counter()
    wanted: set[str] = set()
    for table in ("images", "failures"):
        found.update(DeltaTable(store / table).to_pyarrow_table(columns=["image_id"])["image_id"].to_pylist())
        wanted |= set(DeltaTable(expected / table).to_pyarrow_table(columns=["image_id"])["image_id"].to_pylist())
    return len(wanted - found.keys()), sum(found.values()) - len(found)


def local_copy(place: Place, server: S3Server, target: Path) -> Path:
    """A store in a bucket as a folder, fetched from `server`, which nothing disturbs."""
    import s3fs

    fs = s3fs.S3FileSystem(**server.options, use_listings_cache=False)
    fs.get(place.store.removeprefix("s3://"), str(target), recursive=True)
    return target


def judge(store: Path, expected: Path, *, versions: bool = True) -> None:
    """Sound, every image once, and the same descriptors as the undisturbed run.

    versions: the files are those of that run, byte for byte and in their times.
    """
    assert lost_and_twice(store, expected) == (0, 0)
    assert_same(store, expected, versions=versions)


def make_photos(folder: Path, count: int) -> Path:
    """Photos of two shapes, and a file that is none."""
    folder.mkdir(parents=True)
    for index in range(count):
        photo(index, *((96, 72) if index % 3 else (72, 96))).save(folder / f"{index:03d}.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def skewed_clock(offset: str) -> dict[str, str]:
    """Variables that set a process's clock forward or back, as `+5d` or `-3h`; its stop watches go on as usual."""
    spec = importlib.util.find_spec("libfaketime")
    found = list(Path(spec.origin).parent.rglob("libfaketime.so.1")) if spec and spec.origin else []
    if not found:
        pytest.skip("libfaketime is not installed (Linux only)")
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": offset, "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}


@contextmanager
def local_cluster(nodes: int = 3) -> Iterator[Any]:
    """A Ray cluster of several nodes on this machine; `remove_node(node, allow_graceful=False)` kills one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    for attempt in range(RAY_START_ATTEMPTS):
        try:
            cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
            break
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == RAY_START_ATTEMPTS - 1:
                raise
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()
