"""Put-if-absent on any storage: the one compare-and-set that a log of numbered files and a store's spec need."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import uuid
from typing import Any

from pipelines.storage.durable import make_folder, sync_paths
from pipelines.storage.errors import reaching
from pipelines.storage.files import filesystem, is_there, join, partial_name, write_bytes
from pipelines.storage.filesystems import Options, is_local

# S3 answers 412 where the name is taken, and 409 where another request for it is on its way.
_TAKEN = {"PreconditionFailed", "412", "ConditionalRequestConflict"}
# A server that has no such requests may call them wrong, too.
_NOT_KNOWN = {"NotImplemented", "501", "MethodNotAllowed", "405", "InvalidArgument", "InvalidRequest", "400"}
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class NoConditionalPut(Exception):
    """This storage, or its driver, cannot put a file only where there is none."""


def put_if_absent(uri: str, data: bytes, options: Options | None = None) -> bool:
    """Write a file whole unless its name is taken; whether this call wrote it.

    On a local disk a file that shows under its name is complete, and when this returns True it survives a power cut.

    Raises:
        NoConditionalPut: the storage refuses such requests. One that takes them and pays no heed shows only in a trial
            (`honours_put_if_absent`).
        OSError and errors of drivers: nobody can say whether the file was written.
    """
    fs, path = filesystem(uri, options)
    if is_local(uri):
        return _link(path, data)
    if not _takes_mode(fs):
        raise NoConditionalPut(f"the driver {type(fs).__name__} has no such request")
    try:
        fs.pipe_file(path, data, mode="create")
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if _codes(error) & _TAKEN:
            return False
        if _codes(error) & _NOT_KNOWN:
            raise NoConditionalPut(str(error)) from error
        raise


def write_once(uri: str, data: bytes, options: Options | None = None) -> bool:
    """Write a file whole unless its name is taken; whether this call wrote it. Of two runs at once, one wins.

    Without put-if-absent the later of two runs wins (`write_unless_there`): what is written is the same for both (a
    spec or a projection of the same request), and the caller reads back what was kept.

    Raises OSError, JobError: the storage cannot be written, or reached.
    """
    with reaching(uri):
        try:
            return put_if_absent(uri, data, options)
        except NoConditionalPut:
            return write_unless_there(uri, data, options)


def write_unless_there(uri: str, data: bytes, options: Options | None = None) -> bool:
    """Write a file whole unless one is found first, for storage without put-if-absent; whether this call wrote it.

    Of two writers at once the later one wins, and both are told that they did.

    Raises OSError, JobError: the storage cannot be written, or reached.
    """
    if is_there(uri, options):
        return False
    write_bytes(uri, data, options)
    return True


def _takes_mode(fs: Any) -> bool:
    """Whether a driver knows of files that are to be created and not overwritten; older ones do not."""
    write = getattr(type(fs), "_pipe_file", type(fs).pipe_file)
    return "mode" in inspect.signature(write).parameters


def _link(path: str, data: bytes) -> bool:
    folders = make_folder(os.path.dirname(path))
    partial = partial_name(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # atomic, and fails where the name is taken
        os.link(partial, path)
        sync_paths(folders)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise NoConditionalPut(str(error)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def _codes(error: OSError) -> set[str]:
    """What S3 answered, which caused its driver's error."""
    causes = [error, error.__cause__]
    return {str(getattr(cause, "response", {}).get("Error", {}).get("Code")) for cause in causes if cause}


def honours_put_if_absent(folder: str, options: Options | None = None) -> bool:
    """Whether the storage refuses a second put of one name, found out by trying: servers of one protocol differ, and so
    do file systems in hard links.

    Raises OSError, JobError: the storage cannot be written, or reached.
    """
    uri = join(folder, f"probe-{uuid.uuid4().hex}")
    fs, path = filesystem(uri, options)
    with reaching(uri):
        try:
            put_if_absent(uri, b"first", options)
            with contextlib.suppress(OSError):  # drivers say in many ways that a name is taken; what is there tells
                put_if_absent(uri, b"second", options)
            return bool(fs.cat_file(path) == b"first")
        except NoConditionalPut:
            return False
        finally:
            with contextlib.suppress(OSError):  # a writer may lack the right to remove files
                fs.rm_file(path)
