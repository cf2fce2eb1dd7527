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

    Raises OSError: a file is gone, or the disk could not take it.
    """
    _sync_all(local_path(uri) for uri in uris if is_local(uri))


def sync_folders(uris: Iterable[str], up_to: str, known: set[str]) -> None:
    """Have the names in folders on the disk, and the names of these folders in those above, that of `up_to` included.

    known: folders whose own names were found to be there before, by this process; the others are added. A sync costs a
    disk the same with nothing new to it.
    """
    root, due = local_path(up_to), set[str]()
    paths = [local_path(uri) for uri in uris if is_local(uri)]
    new = set[str]()
    for path in paths:
        due.add(path)
        while path not in known and path.startswith(root):
            new.add(path)
            path = os.path.dirname(path)
            due.add(path)
    _sync_all(due)
    known |= new


def _sync_all(paths: Iterable[str]) -> None:
    found = sorted(set(paths))
    if len(found) < 2:
        for path in found:
            _sync(path)
        return
    with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
        list(pool.map(_sync, found))


def _sync(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # one above the store, which others own and made long ago
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
