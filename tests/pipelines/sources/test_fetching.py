"""Fetching from storage that fails, changes and charges by the request."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.sources import fetch, list_images
from pipelines.sources.fetching import MAX_GAP_BYTES_READ, MAX_JOINT_READ_BYTES


class FlakyFileSystem(MemoryFileSystem):
    """Memory that counts what is asked of it and fails as told."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}  # its own, not that of memory://
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    requests: ClassVar[list[tuple[str, int | None, int | None, float]]] = []
    problems: ClassVar[dict[str, list[Exception]]] = {}  # of each path, raised one after the other
    together = 0
    most_together = 0
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"flaky://{name.removeprefix('flaky://')}"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        kind = type(self)
        with self.lock:
            kind.requests.append((path, start, end, time.monotonic()))
            problem = kind.problems[path].pop(0) if kind.problems.get(path) else None
            kind.together += 1
            kind.most_together = max(kind.most_together, kind.together)
        time.sleep(0.005)
        with self.lock:
            kind.together -= 1
        if problem:
            raise problem
        if start is not None and start == end:
            raise OSError(22, "the requested range cannot be satisfied")  # as S3 answers
        return super().cat_file(path, start=start, end=end)


@pytest.fixture
def flaky() -> Iterator[FlakyFileSystem]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.store.clear()
    FlakyFileSystem.pseudo_dirs[:] = [""]
    FlakyFileSystem.requests.clear()
    FlakyFileSystem.problems.clear()
    FlakyFileSystem.most_together = 0
    yield FlakyFileSystem()


PASSING = [
    TimeoutError("timed out"),
    ConnectionResetError(104, "reset by peer"),
    OSError(5, "SlowDown: please reduce your request rate"),
    RuntimeError("an error of some library"),
]
PERMANENT = [FileNotFoundError(2, "gone"), PermissionError(13, "Access Denied"), IsADirectoryError(21, "a folder")]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_an_error_that_may_pass_is_tried_again(flaky: FlakyFileSystem, error: Exception) -> None:
    flaky.pipe_file("/in/a.jpg", b"abc")
    table = list_images("flaky://in").table
    flaky.problems["/in/a.jpg"] = [error, error]
    (one,) = fetch(table, attempts=3, backoff_s=0.001)
    assert (one.data, one.error, one.attempts) == (b"abc", None, 3) and len(flaky.requests) == 3


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_after_the_last_attempt_the_error_is_the_answer(flaky: FlakyFileSystem, error: Exception) -> None:
    flaky.pipe_file("/in/a.jpg", b"abc")
    flaky.pipe_file("/in/b.jpg", b"def")
    table = list_images("flaky://in").table
    flaky.problems["/in/a.jpg"] = [error] * 9
    one, other = fetch(table, attempts=4, backoff_s=0.001)
    assert (one.data, one.error, one.attempts) == (None, error, 4)
    assert (other.data, other.error, other.attempts) == (b"def", None, 1)


@pytest.mark.parametrize("error", PERMANENT, ids=lambda error: type(error).__name__)
def test_an_error_that_stays_is_not_tried_again(flaky: FlakyFileSystem, error: Exception) -> None:
    flaky.pipe_file("/in/a.jpg", b"abc")
    table = list_images("flaky://in").table
    flaky.problems["/in/a.jpg"] = [error]
    (one,) = fetch(table, attempts=5, backoff_s=60)
    assert (one.data, one.error, one.attempts) == (None, error, 1) and len(flaky.requests) == 1


def test_waits_grow_twofold(flaky: FlakyFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky.pipe_file("/in/a.jpg", b"abc")
    table = list_images("flaky://in").table
    flaky.problems["/in/a.jpg"] = [TimeoutError()] * 4
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)
    assert fetch(table, attempts=5, backoff_s=0.04)[0].data == b"abc"
    waits = [after - before for before, after in pairwise(at for *_, at in flaky.requests)]
    for wait, expected in zip(waits, [0.04, 0.08, 0.16, 0.32], strict=True):
        assert expected <= wait < expected + 0.06


def test_rows_keep_their_order_and_requests_run_together(flaky: FlakyFileSystem) -> None:
    for number in range(60):
        flaky.pipe_file(f"/in/{number:02d}.jpg", b"%d" % number)
    table = list_images("flaky://in").table.take([(number * 7) % 60 for number in range(60)])
    assert [one.data for one in fetch(table)] == [b"%d" % ((number * 7) % 60) for number in range(60)]
    assert 4 <= flaky.most_together <= 16


def test_no_rows_give_no_results() -> None:
    assert fetch(pa.table({name: [] for name in ("uri", "container")})) == []


def test_a_file_that_vanished_or_changed_its_size_is_an_error_in_its_place(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.jpg").write_bytes(b"abc")
    table = list_images(str(tmp_path)).table
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jpg").write_bytes(b"longer than it was")
    (tmp_path / "c.jpg").write_bytes(b"")
    gone, longer, empty, same = fetch(table, backoff_s=0.001)
    assert isinstance(gone.error, FileNotFoundError) and gone.attempts == 1
    assert str(longer.error) == "the file changed: 3 bytes when listed, 18 when read" and longer.data is None
    assert str(empty.error) == "the file changed: 3 bytes when listed, 0 when read" and empty.data is None
    assert same.data == b"abc"


def test_an_answer_that_came_short_is_asked_for_again(flaky: FlakyFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some storage breaks off without saying so."""
    flaky.pipe_file("/in/a.jpg", b"abcdef")
    flaky.pipe_file("/in/b.jpg", b"abcdef")
    table = list_images("flaky://in").table
    original, cuts = FlakyFileSystem.cat_file, {"/in/a.jpg": 2, "/in/b.jpg": 9}

    def cut(self: FlakyFileSystem, path: str, *arguments: Any, **named: Any) -> bytes:
        data = original(self, path, *arguments, **named)
        cuts[path] -= 1
        return data[:4] if cuts[path] >= 0 else data

    monkeypatch.setattr(FlakyFileSystem, "cat_file", cut)
    mended, short = fetch(table, attempts=3, backoff_s=0.001)
    assert (mended.data, mended.attempts) == (b"abcdef", 3)
    assert short.data is None and str(short.error) == "the file changed: 6 bytes when listed, 4 when read"


def test_what_is_too_large_is_not_read(flaky: FlakyFileSystem, tmp_path: Path) -> None:
    flaky.pipe_file("/in/a.jpg", b"x" * 11)
    flaky.pipe_file("/in/b.tar", tar_of([("large.jpg", b"y" * 11), ("small.jpg", b"z" * 10)]))
    table = list_images("flaky://in").table
    flaky.requests.clear()
    plain, large, small = fetch(table, max_bytes=10)
    assert small.data == b"z" * 10 and len(flaky.requests) == 1
    for one in (plain, large):
        assert isinstance(one.error, ValueError) and str(one.error).startswith(
            "the file has 11 bytes, more than the 10"
        )
    (tmp_path / "grows.jpg").write_bytes(b"x")
    table = list_images(str(tmp_path)).table
    with open(tmp_path / "grows.jpg", "wb") as file:
        file.truncate(1 << 40)
    (grown,) = fetch(table, max_bytes=10)
    assert "the file changed: 1 bytes when listed, 11 when read" in str(grown.error)


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_neighbouring_members_of_a_tar_are_read_in_one_request(flaky: FlakyFileSystem) -> None:
    members = [(f"{number:04d}.jpg", bytes([number % 251]) * (1000 + number)) for number in range(200)]
    flaky.pipe_file("/in/a.tar", tar_of(members))
    table = list_images("flaky://in/a.tar").table
    flaky.requests.clear()
    assert [one.data for one in fetch(table)] == [data for _, data in members]
    assert len(flaky.requests) == 1
    flaky.requests.clear()
    shuffled = table.take([(number * 7) % 200 for number in range(200)])
    assert [one.data for one in fetch(shuffled)] == [members[(number * 7) % 200][1] for number in range(200)]
    assert len(flaky.requests) == 1, "whatever order they are asked for in"


def test_what_lies_far_apart_in_a_tar_is_not_read_along(flaky: FlakyFileSystem) -> None:
    gap = ("between.bin", bytes(MAX_GAP_BYTES_READ + 1))
    members = [("0.jpg", b"zero"), ("1.jpg", b"one"), gap, ("2.jpg", b"two"), ("3.jpg", b"three")]
    flaky.pipe_file("/in/a.tar", tar_of(members))
    table = list_images("flaky://in/a.tar").table
    flaky.requests.clear()
    assert [one.data for one in fetch(table)] == [b"zero", b"one", b"two", b"three"]
    assert len(flaky.requests) == 2
    assert sum((end or 0) - (start or 0) for _, start, end, _ in flaky.requests) < MAX_GAP_BYTES_READ


def test_one_request_is_never_longer_than_the_limit(flaky: FlakyFileSystem) -> None:
    size = MAX_JOINT_READ_BYTES // 3
    flaky.pipe_file("/in/a.tar", tar_of([(f"{number}.jpg", bytes([number]) * size) for number in range(5)]))
    table = list_images("flaky://in/a.tar").table
    flaky.requests.clear()
    fetched = fetch(table)
    assert [one.data for one in fetched] == [bytes([number]) * size for number in range(5)]
    lengths = [(end or 0) - (start or 0) for _, start, end, _ in flaky.requests]
    assert max(lengths) <= MAX_JOINT_READ_BYTES and len(lengths) == 3


def test_members_of_two_tars_and_plain_files_in_one_call(flaky: FlakyFileSystem) -> None:
    for name in ("a", "b"):
        flaky.pipe_file(f"/in/{name}.tar", tar_of([(f"{number}.jpg", f"{name}{number}".encode()) for number in "012"]))
    flaky.pipe_file("/in/c.jpg", b"c")
    table = list_images("flaky://in").table.take([6, 0, 3, 1, 4, 2, 5])
    flaky.requests.clear()
    assert [one.data for one in fetch(table)] == [b"c", b"a0", b"b0", b"a1", b"b1", b"a2", b"b2"]
    assert len(flaky.requests) == 3


def test_empty_images_need_no_bytes(flaky: FlakyFileSystem) -> None:
    flaky.pipe_file("/in/a.tar", tar_of([("empty.jpg", b"")]))
    flaky.pipe_file("/in/b.jpg", b"")
    assert [(one.data, one.error) for one in fetch(list_images("flaky://in").table)] == [(b"", None), (b"", None)]


def test_a_tar_that_became_shorter_is_an_error_of_what_it_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([("0.jpg", b"0" * 600), ("1.jpg", b"1" * 600), ("2.jpg", b"2" * 600)]))
    table = list_images(str(path)).table
    path.write_bytes(path.read_bytes()[: 512 + 1024 + 512 + 300])
    first, second, third = fetch(table, backoff_s=0.001)
    assert first.data == b"0" * 600
    assert all(one.data is None and "became shorter" in str(one.error) for one in (second, third))
    path.unlink()
    assert all(isinstance(one.error, FileNotFoundError) for one in fetch(table))


def test_a_failing_tar_fails_its_members_and_no_others(flaky: FlakyFileSystem) -> None:
    for name in ("a", "b"):
        flaky.pipe_file(f"/in/{name}.tar", tar_of([(f"{number}.jpg", name.encode()) for number in "012"]))
    table = list_images("flaky://in").table
    flaky.problems["/in/a.tar"] = [TimeoutError("timed out")] * 2
    fetched = fetch(table, attempts=2, backoff_s=0.001)
    assert [one.data for one in fetched] == [None] * 3 + [b"b"] * 3
    assert [str(one.error) for one in fetched[:3]] == ["timed out"] * 3


def test_a_row_group_is_read_once_for_all_its_rows(flaky: FlakyFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b"%d" % number for number in range(30)]}), buffer, row_group_size=10)
    flaky.pipe_file("/in/a.parquet", buffer.getvalue())
    table = list_images("flaky://in").table
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counting(self: pq.ParquetFile, group: int, **options: Any) -> pa.Table:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    found = [one.data for start in range(0, 30, 5) for one in fetch(table.slice(start, 5))]
    assert found == [b"%d" % number for number in range(30)] and read == [0, 1, 2]


def test_an_unknown_protocol_is_an_error_in_its_place_and_not_an_exception(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    rows = list_images(str(tmp_path)).table.to_pylist()
    table = pa.Table.from_pylist([rows[0], {**rows[0], "uri": "nosuch://bucket/a.jpg"}])
    good, bad = fetch(table)
    assert good.data == b"abc" and bad.data is None and "protocol that is not known" in str(bad.error)
