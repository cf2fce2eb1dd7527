"""File systems of their own: small ones that fill, read-only ones."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str, *, kind: str = "tmpfs", device: str = "tmpfs") -> Iterator[Path]:
    """A file system at `folder`, with options such as size=9m. Skips where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, "-o", options, device, str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system takes rights that this user lacks")
    try:
        yield folder
    finally:
        # what still has a file open must not keep the folder in the way of later tests
        subprocess.run(["umount", *(["--lazy"] if kind == "tmpfs" else []), str(folder)], check=True)


def enlarge(folder: Path, size: str = "200m") -> None:
    """Give a small tmpfs room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
