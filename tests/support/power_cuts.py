"""A disk of its own, and what a power cut would leave of it: what the file system has written, nothing that it only
remembers. It is a file in a loop device, copied while it is mounted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def make_disk(image: Path, megabytes: int = 24) -> Path:
    """An empty ext4 in a file. Skips where there is no mkfs.ext4."""
    with image.open("wb") as file:
        file.truncate(megabytes * 2**20)
    if shutil.which("mkfs.ext4") is None or subprocess.run(["mkfs.ext4", "-q", "-F", str(image)]).returncode:
        pytest.skip("mkfs.ext4 is not installed")
    return image


@contextmanager
def mounted_disk(image: Path, folder: Path) -> Iterator[Path]:
    """The disk at a folder. Skips where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    # `commit`: so that the file system writes nothing by itself in the time of a test
    command = ["mount", "-o", "loop,commit=300", str(image), str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system takes rights that this user lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def cut_power(image: Path, copy: Path) -> Path:
    """The disk as it is found after a power cut at this moment."""
    shutil.copyfile(image, copy)
    return copy
