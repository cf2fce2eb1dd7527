"""Arrays as one .npz file, compared with their checksums when they are read.

The format is a zip file, which carries a CRC32 of every array.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.storage.files import filesystem
from pipelines.storage.filesystems import Options
from pipelines.store.checksums import UNREADABLE_ZIP, check_zip
from pipelines.store.parquet import DamagedFile


def npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    """The content of a file with these arrays."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    return content.getvalue()


def read_npz(uri: str, options: Options) -> dict[str, np.ndarray] | None:
    """The arrays of a file by their names, or None when there is none. Raises DamagedFile."""
    fs, path = filesystem(uri, options)
    try:
        return npz_arrays(uri, fs.cat_file(path))
    except FileNotFoundError:
        return None


def npz_arrays(uri: str, data: bytes) -> dict[str, np.ndarray]:
    """The arrays in the content of a file. uri: what a sentence calls it. Raises DamagedFile."""
    try:
        check_zip(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (*UNREADABLE_ZIP, EOFError, KeyError, ValueError, SyntaxError, tokenize.TokenError) as error:
        raise DamagedFile(uri, str(error) or type(error).__name__) from None
