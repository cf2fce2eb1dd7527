"""What was written on a local disk survives a power cut: files, and the folders that hold their names.

Object storage answers a put when it is durable; nothing is done there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from pipelines.storage.filesystems import is_local, local_path

SYNCS_AT_ONCE = 8  # a disk takes several at once in the time of one


def sync_files(uris: Iterable[str]) -> None:
    """Have the bytes of files on the disk, whoever wrote them on this machine.

    Raises OSError: the disk could not take them.
    """
    paths = [local_path(uri) for uri in uris if is_local(uri)]
    if len(paths) < 2:
        for path in paths:
            _sync(path)
        return
    with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
        list(pool.map(_sync, paths))


def sync_folders(uris: Iterable[str], up_to: str) -> None:
    """Have the names in folders on the disk, and those of the folders themselves in the ones above, up to `up_to`."""
    root = local_path(up_to)
    folders: set[str] = set()
    for uri in uris:
        path = local_path(uri)
        while is_local(uri) and path not in folders and path.startswith(root):
            folders.add(path)
            path = os.path.dirname(path)
    for folder in sorted(folders, reverse=True):  # the deepest first: a name is there when what it names is
        _sync(folder)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
