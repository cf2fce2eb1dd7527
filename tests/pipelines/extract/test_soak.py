"""Everything that test_faults.py and test_killed.py do, at random moments and in random order, for a while.

`make soak` runs it for SOAK_MINUTES (20) from SOAK_SEED, which it prints. Every disturbance has a store of its own.
After each: the same command completes, verify is clean, every image is in images or failures exactly once, and the
descriptors are those of a run that nobody disturbed.

SOAK_WITHOUT_RAY=1 leaves Ray and the model out, and with them the deaths of workers and nodes: for machines too busy to
start them, and for many runs in little time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from disturbed_runs import (
    ATTEMPTS,
    NODE,
    RUNS,
    Place,
    finish,
    judge,
    local_cluster,
    local_copy,
    lost_and_twice,
    make_photos,
    run,
    skewed_clock,
    started,
    workers,
)
from faulty_proxy import FaultyProxy, by_chance, faulty_proxy, nothing_wrong
from file_systems import enlarge, mounted
from s3_server import BUCKET, S3Server
from small_runs import photo

MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))
WITH_RAY = not os.environ.get("SOAK_WITHOUT_RAY")
IMAGES = 36
LONGEST_ROUND = 10  # minutes, on a machine that has other things to do

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * (MINUTES + 3 * LONGEST_ROUND))]


class Soak:
    """One cluster, one bucket, one folder of photos, and what was done to runs over them."""

    def __init__(self, folder: Path, server: S3Server, proxy: FaultyProxy, cluster: Any, seed: int) -> None:
        self.folder, self.server, self.proxy, self.cluster = folder, server, proxy, cluster
        self.random = random.Random(seed)
        self.injected: Counter[str] = Counter()
        self.lost = self.twice = self.rounds = 0
        self.joining = (f"run.address={cluster.address}", "run.cpus_per_worker=1") if cluster else ()
        self.prefix = f"s3://{BUCKET}/soak{seed}"
        self.source = make_photos(folder / "in", IMAGES)
        self.expected = folder / "expected"
        finish(Place(str(self.source), str(self.expected), overrides=self.joining, with_ray=WITH_RAY))
        self._put(self.source)
        clean = self._in_bucket("expected", server)
        finish(clean)
        self.expected_in_bucket = local_copy(clean, server, folder / "expected-in-bucket")

    def _put(self, source: Path) -> None:
        import s3fs

        s3fs.S3FileSystem(**self.server.options).put(str(source), f"{self.prefix[5:]}/in", recursive=True)

    @property
    def disturbances(self) -> list[Callable[[], None]]:
        of_ray = [self.worker_killed, self.node_killed] if self.cluster else []
        return [
            *of_ray,
            self.driver_killed,
            self.storage_fails,
            self.driver_killed_while_storage_fails,
            self.two_runs,
            self.four_runs,
            self.two_runs_while_storage_fails,
            self.disk_fills,
            self.files_change,
            self.clock_is_wrong,
        ]

    def local(self) -> Place:
        self.rounds += 1
        store = str(self.folder / f"store{self.rounds}")
        return Place(str(self.source), store, overrides=self.joining, with_ray=WITH_RAY)

    def remote(self, share: float) -> Place:
        self.rounds += 1
        self.proxy.plan = by_chance(self.random.randrange(2**32), share)
        return self._in_bucket(f"store{self.rounds}", self.proxy.server)

    def _in_bucket(self, store: str, server: S3Server) -> Place:
        """Settings reach the workers of a cluster that was started before, the driver's environment does not."""
        reaching = (f"storage.options.{key}={value}" for key, value in server.options.items())
        overrides = (*self.joining, *reaching)
        return Place(f"{self.prefix}/in", f"{self.prefix}/{store}", server, overrides, with_ray=WITH_RAY)

    def check(self, place: Place, *, attempts: int = 2, versions: bool = True) -> None:
        """The same command completes, and what it leaves is right."""
        finish(place, attempts)
        if place.server is None:
            store, expected = Path(place.store), self.expected
        else:
            self.proxy.plan = nothing_wrong
            store, expected = (
                local_copy(place, self.server, self.folder / f"copy{self.rounds}"),
                self.expected_in_bucket,
            )
        lost, twice = lost_and_twice(store, expected)
        self.lost, self.twice = self.lost + lost, self.twice + twice
        judge(store, expected, versions=versions)
        shutil.rmtree(store)

    def killed_at_random(self, place: Place, times: int) -> None:
        for _ in range(times):
            with started(place) as process:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=self.random.uniform(3, 25))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    self.injected["driver killed"] += 1

    def busy(self, place: Place, process: subprocess.Popen[bytes]) -> bool:
        """Wait until workers have committed something; False when the run ended before."""
        log = Path(place.store) / "images" / "_delta_log"
        while process.poll() is None:
            if len(list(log.glob("*.json"))) > self.random.randint(1, 4):
                return True
            time.sleep(0.01)
        return False

    def driver_killed(self) -> None:
        place = self.local()
        self.killed_at_random(place, self.random.randint(1, 3))
        self.check(place)

    def worker_killed(self) -> None:
        place = self.local()
        with started(place) as process:
            if self.busy(place, process) and (victims := workers(os.getpid())):
                with suppress(psutil.NoSuchProcess):
                    self.random.choice(victims).kill()  # as the kernel does when memory runs out
                    self.injected["worker killed"] += 1
            assert process.wait(timeout=400) == 0
        self.check(place)

    def node_killed(self) -> None:
        place = self.local()
        with started(place) as process:
            if self.busy(place, process):
                node = self.random.choice(sorted(self.cluster.worker_nodes, key=str))
                self.cluster.remove_node(node, allow_graceful=False)
                self.injected["node killed"] += 1
            assert process.wait(timeout=400) == 0
        while len(self.cluster.worker_nodes) < 2:
            self.cluster.add_node(**NODE)
        self.check(place)

    def storage_fails(self) -> None:
        self.check(self.remote(self.random.uniform(0.02, 0.12)), attempts=ATTEMPTS)

    def driver_killed_while_storage_fails(self) -> None:
        place = self.remote(self.random.uniform(0.02, 0.1))
        self.killed_at_random(place, 1)
        self.check(place, attempts=ATTEMPTS)

    def together(self, place: Place, count: int) -> set[int]:
        with ExitStack() as stack:
            runs = [stack.enter_context(started(place)) for _ in range(count)]
            codes = {one.wait(timeout=500) for one in runs}
        self.injected[f"{count} runs at once"] += 1
        return codes

    def two_runs(self) -> None:
        place = self.local()
        assert self.together(place, 2) == {0}
        self.check(place)

    def four_runs(self) -> None:
        place = self.local()
        assert self.together(place, 4) == {0}
        self.check(place)

    def two_runs_while_storage_fails(self) -> None:
        place = self.remote(self.random.uniform(0.01, 0.05))
        assert self.together(place, 2) <= {0, 1}
        self.check(place, attempts=ATTEMPTS)

    def disk_fills(self) -> None:
        place = self.local()
        disk = Path(place.store)
        place.store = str(disk / "store")
        try:
            with mounted(disk, f"size={self.random.randint(400, 1600)}k"):
                self.injected["disk full"] += run(place).code == 1
                enlarge(disk)
                self.check(place)
        except pytest.skip.Exception:
            return  # this user may mount nothing

    def files_change(self) -> None:
        """Some are another photo, and some are gone, for a while; in the end all are as before but for their times."""
        place = self.local()
        source = Path(shutil.copytree(self.source, self.folder / f"in{self.rounds}"))
        place.source = str(source)
        with started(place) as process:
            while process.poll() is None and not (Path(place.store) / "images").exists():
                time.sleep(0.01)
            for name in self.random.sample(sorted(path.name for path in source.glob("0*.jpg")), 8):
                time.sleep(self.random.uniform(0, 0.5))
                path = source / name
                path.unlink()
                if self.random.random() < 0.5:
                    photo(self.random.randrange(1000, 2000)).save(path)
                self.injected["file changed or gone"] += 1
            assert process.wait(timeout=400) in (0, 3)
        for path in self.source.iterdir():
            shutil.copyfile(path, source / path.name)  # with a time of its own
        self.check(place, versions=False)

    def clock_is_wrong(self) -> None:
        """The driver's; that of its workers is right."""
        offsets = self.random.sample(["+45d", "+5h", "-3d", "-20m"], 2)
        place = self.local()
        for offset in offsets:
            try:
                place.environment = skewed_clock(offset)
            except pytest.skip.Exception:
                return
            self.injected["clock set wrong"] += 1
            self.killed_at_random(place, 1)
        self.check(place)

    def table(self, minutes: float) -> str:
        rows = [*sorted(self.injected.items())]
        rows += [(f"storage: {kind}", count) for kind, count in sorted(self.proxy.injected.items())]
        rows = [("faults injected", sum(count for _, count in rows)), *((f"  {kind}", n) for kind, n in rows)]
        rows += [("rounds", self.rounds), ("runs started", RUNS["started"]), ("runs completed", RUNS["completed"])]
        rows += [("rows lost", self.lost), ("rows twice", self.twice)]
        return "\n".join(f"{what:28}{count:8,}" for what, count in rows) + f"\nin {minutes:.1f} minutes"


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture
def soak(tmp_path: Path, s3: S3Server, seed: int) -> Iterator[Soak]:
    with faulty_proxy(s3) as proxy, local_cluster() if WITH_RAY else nullcontext() as cluster:
        yield Soak(tmp_path, s3, proxy, cluster, seed)


def test_soak(soak: Soak, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nSOAK_SEED={seed}", flush=True)
    began = time.monotonic()
    until = began + 60 * MINUTES
    queue: list[Callable[[], None]] = []
    try:
        while time.monotonic() < until:
            if not queue:
                queue = soak.random.sample(soak.disturbances, len(soak.disturbances))
            disturb = queue.pop()
            round_began = time.monotonic()
            disturb()
            with capsys.disabled():
                print(f"  {disturb.__name__} {time.monotonic() - round_began:.0f} s", flush=True)
    finally:
        with capsys.disabled():
            print(soak.table((time.monotonic() - began) / 60), flush=True)
    assert (soak.lost, soak.twice) == (0, 0) and soak.injected + soak.proxy.injected
