"""Storage that fails, nodes that die, clocks that are wrong, files that change: nothing lost, nothing twice, no
traceback, and the same descriptors as a run that nobody disturbed. test_killed.py kills drivers and workers;
test_soak.py does all of it at random."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disturbed_runs import (
    ATTEMPTS,
    Place,
    commits,
    finish,
    judge,
    local_cluster,
    local_copy,
    make_photos,
    run,
    skewed_clock,
    started,
    wait_for,
)
from faulty_proxy import KINDS, MAX_DELAY_SECONDS, FaultyProxy, by_chance, faulty_proxy
from file_systems import enlarge, mounted
from hand_made import source as listing_row
from hand_made import write_shard
from s3_server import BUCKET, S3Server
from small_runs import photo, settings
from stores import descriptors

from pipelines.errors import StorageError
from pipelines.sources import fetch, list_images
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.failures import STORAGE_ERROR, failure_row
from pipelines.store.store import Store
from pipelines.upkeep import verify

IMAGES = 36


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3) as proxy:
        yield proxy


@pytest.fixture
def place() -> str:
    """A prefix of its own for each test."""
    return f"{BUCKET}/{uuid.uuid4().hex[:12]}"


def file_system(server: S3Server) -> Any:
    import s3fs

    return s3fs.S3FileSystem(**server.options, use_listings_cache=False)


def s3_settings(server: S3Server) -> Any:
    return settings(*(f"storage.options.{key}={value}" for key, value in server.options.items()))


# the proxy itself


def test_an_honest_proxy_changes_nothing(s3: S3Server, proxy: FaultyProxy, place: str) -> None:
    """Signatures cover the host: they hold, with awkward names, ranges, uploads in pieces and delta's commits too."""
    through, direct = file_system(proxy.server), file_system(s3)
    names = ["a b.jpg", "é'<script>.jpg", "c%20+?#.jpg"]
    for name in names:
        through.pipe_file(f"{place}/{name}", name.encode() * 10)
        assert direct.cat_file(f"{place}/{name}") == name.encode() * 10
        assert through.cat_file(f"{place}/{name}", start=2, end=7) == (name.encode() * 10)[2:7]
        assert through.info(f"{place}/{name}") == direct.info(f"{place}/{name}")
    large = np.random.default_rng(0).bytes(12 * 2**20)
    with through.open(f"{place}/large", "wb", block_size=5 * 2**20) as file:
        file.write(large)
    assert direct.cat_file(f"{place}/large") == large
    assert sorted(through.find(place)) == sorted(f"{place}/{name}" for name in [*names, "large"])
    Store.create(f"s3://{place}/store", s3_settings(proxy.server))
    assert verify.run(s3_settings(s3), store=f"s3://{place}/store").problems == []
    assert proxy.requests > 30 and not proxy.injected


@pytest.mark.parametrize("kind", KINDS)
def test_the_proxy_does_what_it_says(s3: S3Server, proxy: FaultyProxy, place: str, kind: str) -> None:
    fs = file_system(s3)
    fs.pipe_file(f"{place}/a", b"0123456789")
    proxy.plan = lambda method, path: kind
    url = f"{proxy.endpoint}/{place}/a"
    started = time.monotonic()
    if kind in ("500", "landed 500", "503"):
        with pytest.raises(urllib.error.HTTPError, match=kind[-3:]) as raised:
            urllib.request.urlopen(url, timeout=10)
        assert b"<Code>" in raised.value.read()
    elif kind == "delay":
        with pytest.raises(urllib.error.HTTPError, match="403"):  # unsigned, and that is the server's own answer
            urllib.request.urlopen(url, timeout=10)
        assert 0.05 <= time.monotonic() - started < MAX_DELAY_SECONDS + 2
    else:
        with pytest.raises((OSError, HTTPException)) as broken:
            try:
                urllib.request.urlopen(url, timeout=10)
            except urllib.error.HTTPError as error:
                assert error.code == 403 and kind == "truncate"
                error.read()
        assert not isinstance(broken.value, urllib.error.HTTPError)
    assert proxy.injected == {kind: 1}


def test_a_plan_by_chance_is_that_of_its_seed() -> None:
    one, same, other = (by_chance(seed, 0.3) for seed in (1, 1, 2))
    first = [one("GET", "/") for _ in range(2000)]
    assert first == [same("GET", "/") for _ in range(2000)] and first != [other("GET", "/") for _ in range(2000)]
    assert 0.25 < sum(kind is not None for kind in first) / 2000 < 0.35 and set(first) == {None, *KINDS}


# what is read and written through it


def test_what_is_listed_and_fetched_is_whole(s3: S3Server, proxy: FaultyProxy, place: str) -> None:
    fs = file_system(s3)
    data = {f"{n:02d}.jpg": bytes([n]) * (20_000 + n) for n in range(40)}
    for name, content in data.items():
        fs.pipe_file(f"{place}/{name}", content)
    table = list_images(f"s3://{place}", storage_options=s3.options).table
    proxy.plan = by_chance(0, 0.3, [kind for kind in KINDS if kind != "delay"])
    fetched = fetch(table, storage_options=proxy.server.options, attempts=5, backoff_s=0.01)
    assert [one.error for one in fetched] == [None] * 40
    assert [one.data for one in fetched] == list(data.values())
    assert sum(proxy.injected.values()) > 5


def once(kind: str) -> Callable[[str, str], str | None]:
    """One fault, at the first request."""
    left = iter([kind])
    return lambda method, path: next(left, None)


def test_a_listing_is_whole_or_a_sentence(s3: S3Server, proxy: FaultyProxy, place: str) -> None:
    fs = file_system(s3)
    for n in range(5):
        fs.pipe_file(f"{place}/{n}.jpg", b"x")
    proxy.plan = lambda method, path: "500"
    with pytest.raises(StorageError, match=r"cannot be reached: .*internal error") as raised:
        list_images(f"s3://{place}", storage_options=proxy.server.options)
    assert "\n" not in str(raised.value)
    for kind in ("truncate", "lose", "refuse", "503"):
        proxy.plan = once(kind)
        assert len(list_images(f"s3://{place}", storage_options=proxy.server.options).table) == 5, kind


@pytest.mark.parametrize("kind", ["lose", "landed 500", "truncate", "refuse", "500"])
def test_a_commit_that_the_storage_answers_wrongly_is_made_once(
    s3: S3Server, proxy: FaultyProxy, place: str, kind: str
) -> None:
    """Each table's conditional put in turn; delta-rs repeats it, and is told that its own commit is another's."""
    uri = f"s3://{place}/store"
    store = Store.create(uri, s3_settings(proxy.server))
    for number, table in enumerate(("patches", "images", "failures")):
        faults = iter([kind])

        def plan(method: str, path: str, table: str = table, faults: Iterator[str] = faults) -> str | None:
            return next(faults, None) if method == "PUT" and f"/{table}/_delta_log/" in path else None

        proxy.plan = plan
        row = failure_row(listing_row(f"f{number}"), "decode", "ImageError", "broken", 1, "r1")
        reports = [
            write_shard(store, "r1", [listing_row(f"a{number}"), listing_row(f"b{number}")]),
            ShardReport("progress", failures=[row]),
        ]
        versions = {f"{letter}{number}": (10, "v1") for letter in "abf"}
        outcome = Committer(store, "r1", set()).commit(reports, versions)
        assert (outcome.extracted, outcome.failed, outcome.done_elsewhere) == (2, 1, 0), table
    assert proxy.injected == {kind: 3}
    found = verify.run(s3_settings(s3), store=uri)
    assert (found.images, found.failures, found.problems) == (6, 3, [])


def test_what_the_storage_kept_from_a_run_is_tried_by_the_next(tmp_path: Path, photos: Callable[..., Path]) -> None:
    """Beside a broken image, which is not tried again."""
    folder = photos(2)
    store = Store.create(str(tmp_path / "store"), settings())
    listing = list_images(str(folder)).table
    rows = [{**row, "position": at} for at, row in enumerate(listing.to_pylist())]
    failures = [
        failure_row(rows[0], "fetch", STORAGE_ERROR, "reset by peer", 3, "r1"),
        failure_row(rows[1], "decode", "ImageError", "broken", 1, "r1"),
    ]
    versions = {row["image_id"]: (row["source_size"], row["source_version"]) for row in rows}
    Committer(store, "r1", set()).commit([ShardReport("progress", failures=failures)], versions)
    plan = store.plan(listing)
    assert plan.pending["image_id"].to_pylist() == [rows[0]["image_id"]] and plan.failed_before == 1
    assert len(store.plan(listing, retry_failed=True).pending) == 2


# whole runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photos, and the store of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source, store = make_photos(folder / "in", IMAGES), folder / "store"
    finish(Place(str(source), str(store)))
    return source, store


@pytest.fixture(scope="module")
def in_bucket(
    s3: S3Server, undisturbed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The same photos in a bucket, and a copy of the store of a run there that nobody disturbed."""
    prefix = f"{BUCKET}/{uuid.uuid4().hex[:12]}"
    file_system(s3).put(str(undisturbed[0]), f"{prefix}/in", recursive=True)
    clean = Place(f"s3://{prefix}/in", f"s3://{prefix}/store", s3)
    finish(clean)
    return clean.source, local_copy(clean, s3, tmp_path_factory.mktemp("bucket") / "store")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_from_bucket_to_bucket_through_storage_that_fails(
    s3: S3Server, proxy: FaultyProxy, in_bucket: tuple[str, Path], place: str, tmp_path: Path, seed: int
) -> None:
    source, expected = in_bucket
    proxy.plan = by_chance(seed, 0.1)
    disturbed = Place(source, f"s3://{place}/store", proxy.server)
    runs = finish(disturbed, ATTEMPTS)
    print(f"{sum(proxy.injected.values())} faults in {proxy.requests} requests, {runs} runs: {dict(proxy.injected)}")
    assert set(proxy.injected) == set(KINDS)
    judge(local_copy(disturbed, s3, tmp_path / "store"), expected)


@pytest.mark.slow
def test_storage_that_goes_away_is_a_sentence_and_the_same_command_continues(
    s3: S3Server, proxy: FaultyProxy, in_bucket: tuple[str, Path], place: str, tmp_path: Path
) -> None:
    """It answers nothing but 500 from the second commit of images on."""
    source, expected = in_bucket
    state = {"commits": 0}

    def plan(method: str, path: str) -> str | None:
        state["commits"] += method == "PUT" and "/images/_delta_log/" in path
        return "500" if state["commits"] > 2 else None

    proxy.plan = plan
    disturbed = Place(source, f"s3://{place}/store", proxy.server, environment={"AWS_MAX_ATTEMPTS": "1"})
    ended = run(disturbed)
    assert ended.code == 1 and "same command" in ended.error and ended.error.count("dinoray: ") == 1
    direct = Place(source, disturbed.store, s3)
    finish(direct)
    judge(local_copy(direct, s3, tmp_path / "store"), expected)


@pytest.mark.slow
def test_what_the_storage_keeps_back_is_a_failure_until_the_next_run(
    s3: S3Server, proxy: FaultyProxy, in_bucket: tuple[str, Path], place: str, tmp_path: Path
) -> None:
    source, expected = in_bucket
    proxy.plan = lambda method, path: "500" if method == "GET" and "/003.jpg" in path else None
    disturbed = Place(source, f"s3://{place}/store", proxy.server)
    ended = run(disturbed)
    assert ended.code == 0 and ended.result["extracted"] == IMAGES - 1
    assert ended.result["failures_by_reason"] == {"decode: ImageError": 1, "fetch: StorageError": 1}
    assert "1 image could not be fetched or stored because the storage failed" in ended.error
    direct = Place(source, disturbed.store, s3)
    finish(direct)
    judge(local_copy(direct, s3, tmp_path / "store"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_runs_at_the_same_time_in_one_bucket(
    s3: S3Server, proxy: FaultyProxy, in_bucket: tuple[str, Path], place: str, tmp_path: Path, count: int
) -> None:
    source, expected = in_bucket
    proxy.plan = by_chance(count, 0.02)
    disturbed = Place(source, f"s3://{place}/store", proxy.server)
    with ExitStack() as stack:
        runs = [stack.enter_context(started(disturbed)) for _ in range(count)]
        assert {one.wait(timeout=500) for one in runs} <= {0, 1}
    finish(disturbed, ATTEMPTS)
    judge(local_copy(disturbed, s3, tmp_path / "store"), expected)


@pytest.mark.slow
def test_a_node_of_the_cluster_is_killed(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = undisturbed
    store = tmp_path / "store"
    with local_cluster() as cluster:
        overrides = (f"run.address={cluster.address}", "run.workers=3", "run.cpus_per_worker=1")
        joining = Place(str(source), str(store), overrides=overrides)
        with started(joining) as process:
            wait_for(lambda: commits(store, "images") >= 1, process)
            cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)
            assert process.wait(timeout=400) == 0
    judge(store, expected)


@pytest.mark.slow
def test_a_disk_that_fills_in_mid_run(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = undisturbed
    disk = tmp_path / "disk"
    with mounted(disk, "size=500k"):
        ended = run(place := Place(str(source), str(disk / "store")))
        assert ended.code == 1 and "is full: free some space and run the same command again" in ended.error
        assert verify.run(settings(), store=str(disk / "store")).problems == []
        enlarge(disk)
        finish(place)
        judge(disk / "store", expected)


@pytest.mark.slow
@pytest.mark.parametrize("offset", ["+45d", "-3d"])
def test_nothing_depends_on_the_clock(undisturbed: tuple[Path, Path], tmp_path: Path, offset: str) -> None:
    """A run killed under a clock that is wrong, one beside it whose clock is right, and a third with the first's."""
    source, expected = undisturbed
    store = tmp_path / "store"
    wrong = Place(str(source), str(store), environment=skewed_clock(offset))
    with started(wrong) as process:
        wait_for(lambda: commits(store, "images") >= 2, process)
    with started(Place(str(source), str(store))) as right, started(wrong) as other:
        assert (right.wait(timeout=400), other.wait(timeout=400)) == (0, 0)
    finish(wrong)
    judge(store, expected)


# files that are not what was listed


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_files_that_vanish_or_change_between_listing_and_reading(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vanished: a failure. Changed: a failure or the new content, and the next run mends it. Never mixed."""
    from pipelines import sources
    from pipelines.extract import job as extract

    folder, store = photos(8), tmp_path / "store"
    other = photos(8, "other")  # the next run's content
    gone, longer, swapped = (folder / name for name in ("dog/0000.jpg", "cat/0001.jpg", "dog/0002.jpg"))
    listing = sources.list_images

    def then_change(*arguments: Any, **named: Any) -> Any:
        found = listing(*arguments, **named)
        gone.unlink()
        photo(70, 96, 72).save(longer, quality=98)
        same_size = swapped.stat().st_size
        data = (other / "cat/0003.jpg").read_bytes()[:same_size]
        swapped.write_bytes(data.ljust(same_size, b"\0"))  # another photo of the same length
        return found

    monkeypatch.setattr(sources, "list_images", then_change)
    first = extract.run(settings("run.max_failed_fraction=1"), input=str(folder), store=str(store))
    assert (first.extracted, first.failed) == (6, 2)
    assert first.failures_by_reason == {"fetch: FileNotFoundError": 1, "fetch: OSError": 1}
    monkeypatch.setattr(sources, "list_images", listing)

    second = extract.run(settings(), input=str(folder), store=str(store), prune=True)
    assert (second.extracted, second.changed, second.pruned, second.failed) == (2, 1, 1, 0)
    extract.run(settings(), input=str(folder), store=str(tmp_path / "fresh"))
    mended, fresh = descriptors(store), descriptors(tmp_path / "fresh")
    assert mended.keys() == fresh.keys() and len(mended) == 7
    for image_id, vectors in fresh.items():
        np.testing.assert_allclose(mended[image_id], vectors, atol=2e-3)
    assert verify.run(settings(), store=str(store)).problems == []
