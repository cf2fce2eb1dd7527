"""Put-if-absent, on disks with and without hard links and in memory."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage.conditional import NoConditionalPut, honours_put_if_absent, put_if_absent


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
