"""Every file below a folder or prefix, or that a glob names, without holding more than a folder's entries."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipelines.sources.errors import InputError
from pipelines.sources.filesystems import local_uri, version_of
from pipelines.sources.names import as_text, is_hidden

_MAGIC = re.compile(r"[*?[]")


class FileEntry(NamedTuple):
    """A file that may hold images."""

    key: str  # relative to INPUT, forward slashes, valid text
    uri: str
    path: str  # on its filesystem
    size: int
    version: str

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]


def walk_local(root: str, exclude: str | None) -> Iterator[FileEntry]:
    """Files below a local folder. Links are followed; a folder reached twice is walked once.

    Raises InputError for a folder that may not be read: its images would be missed silently.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name) or entry.path == exclude:
                        continue
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif entry.is_file():
                        yield _local_entry(entry.path, root, entry.stat())
                    # anything else is a socket, a device or a broken link, and never was an image
        except PermissionError:
            raise InputError(
                f"The folder {as_text(folder)} may not be read: give its permissions, or another INPUT."
            ) from None


def _local_entry(path: str, root: str, status: os.stat_result) -> FileEntry:
    key = as_text(os.path.relpath(path, root) if path != root else os.path.basename(path))
    return FileEntry(key.replace(os.sep, "/"), local_uri(path), path, status.st_size, str(status.st_mtime_ns))


def local_file(path: str) -> FileEntry:
    return _local_entry(path, os.path.dirname(path), os.stat(path))


def walk_remote(fs: Any, root: str, exclude: str | None) -> Iterator[FileEntry]:
    """Objects below a prefix, from the storage's own paged listing."""
    for path, info in fs.find(root, detail=True).items():
        entry = remote_entry(fs, path, root, info)
        below = exclude is not None and (path == exclude or path.startswith(exclude + "/"))
        if info.get("type") == "file" and not below and not any(map(is_hidden, entry.key.split("/"))):
            yield entry


def remote_entry(fs: Any, path: str, root: str, info: dict[str, Any]) -> FileEntry:
    root = root.rstrip("/")
    key = path[len(root) :].lstrip("/") if path.startswith(root + "/") else path.rsplit("/", 1)[-1]
    return FileEntry(key, fs.unstrip_protocol(path), path, int(info.get("size") or 0), version_of(info))


def has_magic(path: str) -> bool:
    return _MAGIC.search(path) is not None


def glob_root(pattern: str) -> str:
    """The longest folder before the first wildcard."""
    before = pattern[: _MAGIC.search(pattern).start()] if has_magic(pattern) else pattern  # type: ignore[union-attr]
    return before.rpartition("/")[0] or ("/" if before.startswith("/") else "")


def glob(fs: Any, pattern: str, *, local: bool, exclude: str | None) -> Iterator[FileEntry]:
    """Files that a pattern names; keys are relative to the longest folder before the first wildcard."""
    root = glob_root(pattern)
    for path, info in sorted(fs.glob(pattern, detail=True).items()):
        below = exclude is not None and path.startswith(exclude + "/")
        if info.get("type") != "file" or below or is_hidden(path.rsplit("/", 1)[-1]):
            continue
        yield _local_entry(path, root or "/", os.stat(path)) if local else remote_entry(fs, path, root, info)


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
