"""A disk of its own, and what a power cut would leave of it: what the file system has written, nothing that it only
remembers. It is a file in a loop device, copied while it is mounted."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from file_systems import mounted


def make_disk(image: Path, megabytes: int = 24) -> Path:
    """An empty ext4 in a file. Skips where there is no mkfs.ext4."""
    with image.open("wb") as file:
        file.truncate(megabytes * 2**20)
    if shutil.which("mkfs.ext4") is None or subprocess.run(["mkfs.ext4", "-q", "-F", str(image)]).returncode:
        pytest.skip("mkfs.ext4 is not installed")
    return image


def mounted_disk(image: Path, folder: Path) -> AbstractContextManager[Path]:
    """The disk at a folder. Skips where this user may not mount one."""
    # `commit`: so that the file system writes nothing by itself in the time of a test
    return mounted(folder, "loop,commit=300", kind="ext4", device=str(image))


def cut_power(image: Path, copy: Path) -> Path:
    """The disk as it is found after a power cut at this moment."""
    shutil.copyfile(image, copy)
    return copy
