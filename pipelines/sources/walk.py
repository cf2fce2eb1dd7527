"""Every file below a folder or prefix, or that a glob names, without holding more than a folder's entries."""

from __future__ import annotations

import errno
import heapq
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from fsspec.utils import glob_translate

from pipelines.errors import InputError
from pipelines.sources.names import as_text, is_hidden
from pipelines.storage.filesystems import local_uri, version_of

_MAGIC = re.compile(r"[*?[]")


class FileEntry(NamedTuple):
    """A file that may hold images.

    key: relative to INPUT, with forward slashes, valid text. path: the file's on its filesystem.
    """

    key: str
    uri: str
    path: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]


def walk_local(
    folder: str, exclude: str | None, *, root: str | None = None, levels: int | None = None
) -> Iterator[FileEntry]:
    """Files below a local folder, at most `levels` folders deep; keys are relative to `root`, else to the folder.

    Links are followed; a folder reached twice is walked once, under its own name before that of a link to it.

    Raises InputError for a folder that may not be read: its images would be missed silently.
    """
    seen: set[tuple[int, int]] = set()
    if exclude is not None and os.path.exists(exclude):
        seen.add(_identity(os.stat(exclude)))
    waiting, links = [(folder, 0)], list[tuple[str, int]]()
    while waiting or links:
        current, level = waiting.pop() if waiting else heapq.heappop(links)
        try:
            identity = _identity(os.stat(current))
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(current) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    status = _status(entry)
                    if status is None:
                        continue
                    if not stat.S_ISDIR(status.st_mode):
                        if stat.S_ISREG(status.st_mode):  # a socket or a device is never an image
                            yield _local_entry(entry.path, root or folder, status)
                    elif levels is None or level < levels:
                        if entry.is_symlink():
                            heapq.heappush(links, (entry.path, level + 1))
                        else:
                            waiting.append((entry.path, level + 1))
        except PermissionError:
            raise InputError(
                f"The folder {as_text(current)} may not be read: give its permissions, or another INPUT."
            ) from None
        except FileNotFoundError:
            if current == folder:
                raise


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What an entry or its target is; None for links to nowhere or to themselves, and what was just removed."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _local_entry(path: str, root: str, status: os.stat_result) -> FileEntry:
    key = as_text(os.path.relpath(path, root) if path != root else os.path.basename(path))
    return FileEntry(key.replace(os.sep, "/"), local_uri(path), path, status.st_size, str(status.st_mtime_ns))


def local_file(path: str, root: str | None = None) -> FileEntry:
    return _local_entry(path, root or os.path.dirname(path), os.stat(path))


def walk_remote(fs: Any, folder: str, exclude: str | None, *, root: str | None = None) -> Iterator[FileEntry]:
    """Objects below a prefix, from the storage's own paged listing."""
    for path, info in fs.find(folder, detail=True).items():
        if info.get("type") != "file" or _is_below(path, exclude):
            continue
        if not any(map(is_hidden, path[len(folder) :].split("/"))):
            yield remote_entry(fs, path, folder if root is None else root, info)


def _is_below(path: str, exclude: str | None) -> bool:
    return exclude is not None and (path == exclude or path.startswith(exclude + "/"))


def remote_entry(fs: Any, path: str, root: str, info: dict[str, Any]) -> FileEntry:
    root = root.rstrip("/")
    if not root:
        key = path.lstrip("/")
    else:
        key = path[len(root) :].lstrip("/") if path.startswith(root + "/") else path.rsplit("/", 1)[-1]
    return FileEntry(key, fs.unstrip_protocol(path), path, int(info.get("size") or 0), version_of(info))


def has_magic(path: str) -> bool:
    return _MAGIC.search(path) is not None


def glob_root(pattern: str) -> str:
    """The longest folder before the first wildcard."""
    found = _MAGIC.search(pattern)
    before = pattern[: found.start()] if found else pattern
    return before.rpartition("/")[0] or ("/" if before.startswith("/") else "")


def glob(fs: Any, pattern: str, *, local: bool, exclude: str | None, root: str | None = None) -> Iterator[FileEntry]:
    """Files that a pattern names; keys are relative to `root`, else to the longest folder before the first wildcard.

    Raises InputError for a pattern that means nothing.
    """
    top = glob_root(pattern)
    root = top if root is None else root
    below_top = pattern[len(top) :].lstrip("/")
    try:
        matches = re.compile(glob_translate(pattern)).match
    except ValueError as error:
        raise InputError(f"The pattern {as_text(pattern)} cannot be followed: {error}.") from None
    if local:
        levels = None if "**" in below_top else below_top.count("/")
        yield from (entry for entry in walk_local(top, exclude, root=root, levels=levels) if matches(entry.path))
        return
    for path, info in sorted(fs.glob(pattern, detail=True).items()):
        if info.get("type") != "file" or _is_below(path, exclude):
            continue
        if not any(map(is_hidden, path[len(top) :].split("/"))):
            yield remote_entry(fs, path, root, info)


def expand_braces(text: str) -> list[str]:
    """`shard-{00..03}.tar` and `{a,b}.tar` as WebDataset writes them."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{},]*(?:,[^{},]*)+)\}", text)
    if not found:
        return [text]
    if found[1] is not None:
        width = len(found[1]) if found[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(found[1]), int(found[2]) + 1)]
    else:
        choices = found[3].split(",")
    return [
        whole for choice in choices for whole in expand_braces(text[: found.start()] + choice + text[found.end() :])
    ]
