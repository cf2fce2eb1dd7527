"""Opening any fsspec URI, and telling one version of a file from the next."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pipelines.sources.errors import InputError

DELTA_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")  # of storage options that are delta-rs's own
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "content_md5", "checksum")
_TIME_KEYS = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path of a local URI; `file://` ones are percent-encoded where names are not text."""
    if uri.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))
    return uri


def local_uri(path: str) -> str:
    """The path itself while it is text, else a percent-encoded file:// URI of its bytes."""
    try:
        path.encode()
        return path
    except UnicodeEncodeError:
        return "file://" + quote_from_bytes(os.fsencode(path))


def of_fsspec(options: dict[str, Any]) -> dict[str, Any]:
    """Without those that only delta-rs knows; a driver would hand them on to every request."""
    return {key: value for key, value in options.items() if not key.upper().startswith(DELTA_PREFIXES)}


def open_filesystem(uri: str, storage_options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """The filesystem of a URI and the path on it. Raises InputError for protocols that cannot be opened here."""
    import fsspec

    protocol = uri.split("://")[0] if "://" in uri else "file"
    options = {} if is_local(uri) else of_fsspec(storage_options or {})
    if protocol in _EXTRAS:  # fsspec remembers listings for the life of a process, and would hide what is new
        options = {"use_listings_cache": False, **options}
    try:
        fs = fsspec.filesystem(protocol, **options)
    except ImportError:
        extra = _EXTRAS.get(protocol)
        fix = f'pip install "dinoray[{extra}]"' if extra else f"install the fsspec driver for {protocol}://"
        raise InputError(f"{uri} needs a storage driver that is not installed: {fix}.") from None
    except ValueError:
        raise InputError(
            f"{uri} has a protocol that is not known ({protocol}://): use a path, s3://, gs:// or az://."
        ) from None
    if is_local(uri):
        return fs, local_path(uri)
    return fs, fs._strip_protocol(uri)


def version_of(info: dict[str, Any]) -> str:
    """A file's version: its etag or checksum where the storage has one, else its modification time in ns."""
    for key in _VERSION_KEYS:
        if info.get(key):
            return str(info[key]).strip('"')
    for key in _TIME_KEYS:
        value = info.get(key)
        if isinstance(value, datetime):
            return str(int(value.timestamp() * 1e9))
        if value:
            return str(int(float(value) * 1e9)) if isinstance(value, int | float) else str(value)
    return ""
