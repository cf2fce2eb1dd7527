"""What is written on a local disk is put on it, name and all, where its file system can be asked to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.storage import write_once
from pipelines.storage.durable import sync_paths
from pipelines.storage.files import write_bytes


def refusing(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_may_have_nothing_to_sync_in_a_folder(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    refusing(error, monkeypatch)
    sync_paths([str(tmp_path)])
    with pytest.raises(OSError, match=os.strerror(error)):
        sync_paths([str(file)])


def test_a_folder_that_the_disk_cannot_take_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_paths([str(tmp_path)])


@pytest.mark.parametrize("write", [write_once, write_bytes])
def test_a_small_file_is_synced_with_its_name_and_those_of_new_folders(
    write: Callable[[str, bytes], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write(str(tmp_path / "new" / "folder" / "file"), b"1")
    folders = [str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "folder")]
    assert sorted(synced[1:]) == folders, "the file's bytes come first, under whatever name it has then"
    synced.clear()
    write(str(tmp_path / "new" / "folder" / "other"), b"1")
    assert synced[1:] == folders[2:]
