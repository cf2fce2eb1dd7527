"""Put-if-absent, on disks with and without hard links and in memory."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.storage.conditional import NoConditionalPut, honours_put_if_absent, put_if_absent, write_once
from pipelines.storage.files import filesystem


def test_of_many_puts_of_one_name_one_lands_whole(tmp_path: Path) -> None:
    target = tmp_path / "log" / "1.json"
    contents = [bytes([65 + at]) * 100_000 for at in range(16)]
    with ThreadPoolExecutor(16) as pool:
        landed = list(pool.map(lambda content: put_if_absent(str(target), content), contents))
    assert landed.count(True) == 1
    assert target.read_bytes() == contents[landed.index(True)]
    assert [path.name for path in target.parent.iterdir()] == ["1.json"], "no temporary file is left"


def test_temporary_names_are_unique_over_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers on one shared folder may have the same process id."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    sources = []
    link = os.link

    def linked(source: str, target: str) -> None:
        sources.append(source)
        link(source, target)

    monkeypatch.setattr(os, "link", linked)
    assert put_if_absent(str(tmp_path / "a"), b"1") and not put_if_absent(str(tmp_path / "a"), b"2")
    assert len(set(sources)) == 2


def test_storage_is_tried_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert honours_put_if_absent(str(tmp_path / "log"))
    assert honours_put_if_absent("memory://log")

    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert not honours_put_if_absent(str(tmp_path / "log"))
    with pytest.raises(NoConditionalPut):
        put_if_absent(str(tmp_path / "log" / "1"), b"1")
    assert list((tmp_path / "log").iterdir()) == []


class OlderDriver(MemoryFileSystem):
    """One that knows of no files that are to be created and not overwritten."""

    protocol = "older"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        super().pipe_file(path, value)


class AnsweringDriver(MemoryFileSystem):
    """One that answers as S3 does, by a code."""

    protocol = "answering"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    code: ClassVar[str] = ""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode == "create":
            error = OSError(errno.EIO, "the server said so")
            error.__cause__ = SaidByServer(self.code)
            raise error
        super().pipe_file(path, value, mode)


class SaidByServer(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


for driver in (OlderDriver, AnsweringDriver):
    fsspec.register_implementation(driver.protocol, driver, clobber=True)


def test_a_driver_without_such_puts_is_told_by_what_it_takes() -> None:
    with pytest.raises(NoConditionalPut, match="OlderDriver"):
        put_if_absent("older://log/1", b"1")
    assert not honours_put_if_absent("older://log")


@pytest.mark.parametrize("code", ["NotImplemented", "501", "405", "InvalidArgument"])
def test_a_server_without_such_puts_is_told_by_its_answer(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnsweringDriver, "code", code)
    with pytest.raises(NoConditionalPut):
        put_if_absent("answering://log/1", b"1")
    assert not honours_put_if_absent("answering://log")


@pytest.mark.parametrize("code", ["PreconditionFailed", "412", "ConditionalRequestConflict"])
def test_a_server_says_in_several_ways_that_a_name_is_taken(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnsweringDriver, "code", code)
    assert not put_if_absent("answering://log/1", b"1")


def test_a_probe_that_may_not_be_removed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(*_: Any) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(MemoryFileSystem, "rm_file", remove)
    assert honours_put_if_absent("memory://no-removal")


def test_another_failure_is_not_taken_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnsweringDriver, "code", "SlowDown")
    for put in (put_if_absent, write_once):
        with pytest.raises(OSError, match="the server said so"):
            put("answering://log/2", b"1")


@pytest.mark.parametrize("folder", ["older://once", "memory://once"])
def test_what_is_written_once_stands(folder: str) -> None:
    assert write_once(f"{folder}/spec.json", b"first") and not write_once(f"{folder}/spec.json", b"second")
    fs, path = filesystem(f"{folder}/spec.json")
    assert fs.cat_file(path) == b"first"


def test_without_hard_links_what_is_written_once_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    uri = str(tmp_path / "store" / "store.json")
    assert write_once(uri, b"first") and not write_once(uri, b"second")
    assert Path(uri).read_bytes() == b"first" and len(list(Path(uri).parent.iterdir())) == 1
