"""What was written on a local disk survives a power cut: files, and the folders that hold their names.

Object storage answers a put when it is durable; nothing is done there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from pipelines.storage.filesystems import is_local, local_path

# A disk takes several at once in the time of one.
SYNCS_AT_ONCE = 8
# What file systems say that have nothing to sync in a folder: shared ones of virtual machines, some of FUSE.
_NOTHING_TO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS)


def sync_files(uris: Iterable[str]) -> None:
    """Have the bytes of files on the disk, whoever wrote them on this machine.

    Raises OSError: a file is gone, or the disk could not take it.
    """
    sync_paths(local_path(uri) for uri in uris if is_local(uri))


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
    sync_paths(due)
    known |= new


def make_folder(path: str) -> list[str]:
    """Make a local folder and those above it. Returns the folders to sync for a new name in it to last: itself, and
    those in which a folder was made."""
    holding, folder = [path], path
    while not os.path.isdir(folder) and (above := os.path.dirname(folder)) != folder:
        holding.append(above)
        folder = above
    os.makedirs(path, exist_ok=True)
    return holding


def sync_paths(paths: Iterable[str]) -> None:
    """Have local files and folders on the disk, several at once. Raises OSError where that fails."""
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
    except OSError as error:
        if error.errno not in _NOTHING_TO_SYNC or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
