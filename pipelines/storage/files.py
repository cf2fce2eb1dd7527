"""Paths and small files on any storage that fsspec knows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from typing import Any

from pipelines.errors import JobError
from pipelines.storage.durable import make_folder, sync_paths
from pipelines.storage.errors import reaching
from pipelines.storage.filesystems import Options, is_local, open_filesystem


class DamagedJson(JobError):
    """A file that is to be JSON and is not."""


def normalise(uri: str) -> str:
    """A URI that means the same from every process: local paths become absolute, trailing slashes go."""
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if "://" not in uri:
        return os.path.abspath(os.path.expanduser(uri))
    return uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def filesystem(uri: str, options: Options | None = None) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path of the URI on it.

    Raises:
        RequestError: an unknown protocol, or one whose driver is not installed.
    """
    return open_filesystem(uri, options)


def is_there(uri: str, options: Options | None = None) -> bool:
    """Whether a file is there. Raises what the storage answers where it cannot say: `exists` of some drivers says no
    then."""
    fs, path = filesystem(uri, options)
    try:
        with reaching(uri):
            fs.info(path)
    except FileNotFoundError:
        return False
    return True


def read_json(uri: str, options: Options | None = None) -> dict[str, Any] | None:
    """The JSON object at `uri`, or None when there is none."""
    fs, path = filesystem(uri, options)
    try:
        with reaching(uri):
            content = json.loads(fs.cat_file(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedJson(
            f"{uri} is not readable as JSON ({error}): it was damaged or written by something else."
        ) from None
    if not isinstance(content, dict):
        raise DamagedJson(f"{uri} does not hold a JSON object: it was damaged or written by something else.")
    return content


def write_json(uri: str, content: dict[str, Any], options: Options | None = None) -> None:
    """As write_bytes."""
    write_bytes(uri, json.dumps(content, indent=2, ensure_ascii=False).encode(), options)


def write_bytes(uri: str, data: bytes, options: Options | None = None) -> None:
    """Write a file whole: readers see the old one or the new one, never half, and the new one survives a power cut."""
    fs, path = filesystem(uri, options)
    if not is_local(uri):
        with reaching(uri):
            fs.pipe_file(path, data)  # a put is whole or absent
        return
    folders = make_folder(os.path.dirname(path))
    partial = partial_name(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            # Otherwise a power cut could leave the new name with nothing behind it.
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_paths(folders)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def partial_name(path: str) -> str:
    """Where a file is written before it gets its name; process ids are the same in every container."""
    return f"{path}.{uuid.uuid4().hex[:12]}.partial"


def sha256(uri: str, options: Options | None = None) -> str:
    """Content hash of a file, read in pieces."""
    fs, path = filesystem(uri, options)
    digest = hashlib.sha256()
    with reaching(uri), fs.open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
