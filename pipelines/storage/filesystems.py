"""Opening any fsspec URI, and telling one version of a file from the next."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pipelines.errors import InputError
from pipelines.storage.aws_profile import profile_options

Options = dict[str, Any]


def delta_options(uri: str, options: Options | None = None) -> dict[str, str]:
    """fsspec's storage options for `uri`, as delta-rs names them.

    Keys that delta-rs knows already (`AWS_...`, `GOOGLE_...`, `AZURE_...`) pass unchanged. Without options both
    libraries read the usual environment variables and AWS's configuration files. S3 commits use conditional puts
    (`If-None-Match`).
    """
    given = dict(options or {})
    result = {key: str(value) for key, value in given.items() if key.upper().startswith(DELTA_OPTION_PREFIXES)}
    if uri.startswith(("s3://", "s3a://")):
        client = {**given.get("client_kwargs", {}), **given}
        named = {
            "key": "AWS_ACCESS_KEY_ID",
            "secret": "AWS_SECRET_ACCESS_KEY",
            "token": "AWS_SESSION_TOKEN",
            "endpoint_url": "AWS_ENDPOINT_URL",
            "region_name": "AWS_REGION",
        }
        result |= {delta: str(client[ours]) for ours, delta in named.items() if client.get(ours)}
        # delta-rs takes either case, and where both are given, either of them.
        named_already = {key.upper() for key in result}
        if given.get("anon"):
            result["AWS_SKIP_SIGNATURE"] = "true"
        elif "AWS_ACCESS_KEY_ID" not in named_already:
            found = profile_options(given.get("profile"))
            result |= {key: value for key, value in found.items() if key not in named_already}
        endpoint = result.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL", "")
        if endpoint.startswith("http://"):
            result.setdefault("AWS_ALLOW_HTTP", "true")
        result.setdefault("aws_conditional_put", "etag")
    elif uri.startswith(("gs://", "gcs://")) and isinstance(given.get("token"), str):
        result["GOOGLE_SERVICE_ACCOUNT_PATH"] = given["token"]
    elif uri.startswith(("az://", "abfs://", "abfss://")):
        named = {
            "account_name": "AZURE_STORAGE_ACCOUNT_NAME",
            "account_key": "AZURE_STORAGE_ACCOUNT_KEY",
            "sas_token": "AZURE_STORAGE_SAS_TOKEN",
            "client_id": "AZURE_STORAGE_CLIENT_ID",
            "client_secret": "AZURE_STORAGE_CLIENT_SECRET",
            "tenant_id": "AZURE_STORAGE_TENANT_ID",
        }
        result |= {delta: str(given[ours]) for ours, delta in named.items() if given.get(ours)}
    return result


DELTA_OPTION_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
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
    """The options without those that only delta-rs knows: a driver would pass them on with every request."""
    return {key: value for key, value in options.items() if not key.upper().startswith(DELTA_OPTION_PREFIXES)}


def open_filesystem(uri: str, storage_options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """The filesystem of a URI and the path on it. Raises InputError for protocols that cannot be opened here."""
    import fsspec

    protocol = uri.split("://")[0] if "://" in uri else "file"
    options = {} if is_local(uri) else of_fsspec(storage_options or {})
    # fsspec remembers listings for the life of a process, and would hide what is new.
    if protocol in _EXTRAS:
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


def modified_at(info: dict[str, Any]) -> float | None:
    """When a file was last written, in seconds since 1970 by the clock of its storage; None where that is not known."""
    for key in _TIME_KEYS:
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
