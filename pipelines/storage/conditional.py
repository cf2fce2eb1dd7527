"""Put-if-absent on any storage: the one compare-and-set that a log of numbered files needs."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid

from pipelines.storage.errors import reaching
from pipelines.storage.files import filesystem, join
from pipelines.storage.filesystems import Options, is_local

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class NoConditionalPut(Exception):
    """This storage, or its driver, cannot put a file only where there is none."""


def put_if_absent(uri: str, data: bytes, options: Options | None = None) -> bool:
    """Write a file whole unless its name is taken; whether this call wrote it.

    On a local disk a file that shows under its name is complete and its bytes are on the disk; that its folder has the
    name for good takes `durable.sync_folders`.

    Raises:
        NoConditionalPut: the storage refuses such requests. One that takes them and pays no heed shows only in a trial
            (`honours_put_if_absent`).
        OSError and errors of drivers: nobody can say whether the file was written.
    """
    fs, path = filesystem(uri, options)
    if is_local(uri):
        return _link(path, data)
    try:
        fs.pipe_file(path, data, mode="create")
        return True
    except FileExistsError:
        return False
    except (TypeError, NotImplementedError, ValueError) as error:
        raise NoConditionalPut(str(error)) from error
    except OSError as error:
        if _says_taken(error):
            return False
        raise


def _link(path: str, data: bytes) -> bool:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"  # two containers on one shared folder may have the same process id
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, path)  # atomic, and fails where the name is taken
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


def _says_taken(error: OSError) -> bool:
    """S3 answers 412 where the name is taken, and 409 where another request for it is on its way."""
    causes = [error, error.__cause__]
    codes = {getattr(cause, "response", {}).get("Error", {}).get("Code") for cause in causes if cause}
    return bool(codes & {"PreconditionFailed", "412", "ConditionalRequestConflict"})


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
            with contextlib.suppress(OSError):  # drivers say in many ways that a name is taken; what stands there tells
                put_if_absent(uri, b"second", options)
            return bool(fs.cat_file(path) == b"first")
        except NoConditionalPut:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(path)
