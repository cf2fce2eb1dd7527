"""CRC32 of files that are not Parquet: every reader of a file compares it with what was written."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipelines.store.parquet import DamagedFile

PIECE_BYTES = 1 << 22
# What zipfile raises where bytes are others than were written.
UNREADABLE_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, OSError, RuntimeError)

_T = TypeVar("_T")


def checksum(path: str) -> str:
    """Of a local file, such as "crc32:0a1b2c3d"."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            value = zlib.crc32(piece, value)
    return f"crc32:{value:08x}"


def checksum_of(data: bytes) -> str:
    """The same of a file's content."""
    return f"crc32:{zlib.crc32(data):08x}"


def read_checked(uri: str, path: str, expected: str | None, read: Callable[[str], _T]) -> _T:
    """What `read` makes of a local file, whose checksum is computed meanwhile, so that a disk reads it once.

    uri: what the file is called in a sentence. expected: None for a file from before there were checksums.

    Raises DamagedFile for a file with another checksum, whatever `read` says of it; else what `read` raises.
    """
    if expected is None:
        return read(path)
    with ThreadPoolExecutor(1) as pool:
        computed = pool.submit(checksum, path)
        try:
            return read(path)
        finally:
            if computed.result() != expected:
                raise DamagedFile(uri, f"its checksum is {computed.result()}, {expected} was written")


def check_zip(data: bytes) -> None:
    """Compare all that a zip file holds with the checksums that it carries. Raises one of UNREADABLE_ZIP."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} has another checksum")
