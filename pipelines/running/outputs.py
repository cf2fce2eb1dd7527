"""Files that a job writes where somebody asked for them: pages, plots, pictures, masks."""

from __future__ import annotations

from pipelines import storage
from pipelines.errors import JobError
from pipelines.storage.errors import explain_write_error


def write_output(uri: str, data: bytes, options: storage.Options) -> None:
    """Write a file whole. Raises JobError where it cannot be written."""
    try:
        storage.write_bytes(uri, data, options)
    except OSError as error:
        raise explain_write_error(error, uri) or JobError(f"{uri} cannot be written: {storage.said(error)}.") from None
