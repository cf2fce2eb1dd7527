"""Paths and small files on any fsspec storage, and the same credentials said in delta-rs's words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.aws_profile import profile_options
from pipelines.errors import DinorayError, JobError, RequestError
from pipelines.sources.errors import InputError, drivers_own, failed_storage
from pipelines.sources.errors import said as said
from pipelines.sources.filesystems import DELTA_PREFIXES, open_filesystem
from pipelines.sources.filesystems import is_local as is_local

Options = dict[str, Any]


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
    try:
        return open_filesystem(uri, options)
    except InputError as error:
        raise RequestError(str(error)) from None


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Errors of the storage drivers' own libraries as one sentence; they are not OSErrors.

    Raises JobError where nobody answers, or where there are no credentials.
    """
    try:
        yield
    except Exception as error:
        if not drivers_own(error):
            raise
        raise JobError(f"{uri} cannot be reached: {said(error)}. Check its endpoint and your credentials.") from None


def explain_failed_storage(error: Exception, uri: str = "The storage") -> JobError | None:
    """The sentence for an error of remote storage; None for anything else."""
    if isinstance(error, DinorayError | InputError) or not failed_storage(error):
        return None
    return JobError(
        f"{uri} could not be reached, or stopped answering: {said(error)}. What is committed stays: run the same "
        "command again."
    )


def delta_options(uri: str, options: Options | None = None) -> dict[str, str]:
    """fsspec's storage options for `uri`, as delta-rs names them.

    Keys that delta-rs knows already (`AWS_...`, `GOOGLE_...`, `AZURE_...`) pass unchanged. Without options both
    libraries read the usual environment variables and AWS's configuration files. S3 commits use conditional puts
    (`If-None-Match`).
    """
    given = dict(options or {})
    result = {key: str(value) for key, value in given.items() if key.upper().startswith(DELTA_PREFIXES)}
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
        named_already = {key.upper() for key in result}  # delta-rs takes either case, and of both any one
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


def read_json(uri: str, options: Options | None = None) -> dict[str, Any] | None:
    """The JSON object at `uri`, or None when there is none."""
    fs, path = filesystem(uri, options)
    try:
        with reaching(uri):
            content = json.loads(fs.cat_file(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise JobError(
            f"{uri} is not readable as JSON ({error}): it was damaged or written by something else."
        ) from None
    if not isinstance(content, dict):
        raise JobError(f"{uri} holds no JSON object: it was damaged or written by something else.")
    return content


def write_json(uri: str, content: dict[str, Any], options: Options | None = None) -> None:
    """Write a JSON object whole: readers see the old file or the new one, never half."""
    write_bytes(uri, json.dumps(content, indent=2, ensure_ascii=False).encode(), options)


def write_bytes(uri: str, data: bytes, options: Options | None = None) -> None:
    fs, path = filesystem(uri, options)
    if not is_local(uri):
        with reaching(uri):
            fs.pipe_file(path, data)  # a put is whole or absent
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing behind it
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def write_once(uri: str, data: bytes, options: Options | None = None) -> bool:
    """Write `uri` unless it exists; whether this call wrote it. Of two runs that start together one wins.

    Storage without conditional puts through fsspec falls back to looking first; what is written there is the same
    for both (a spec or a projection of the same request), and the caller reads back what stands.
    """
    fs, path = filesystem(uri, options)
    if is_local(uri):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{os.getpid()}.partial"
        Path(partial).write_bytes(data)
        try:
            os.link(partial, path)  # atomic, and fails where the name is taken
            return True
        except FileExistsError:
            return False
        finally:
            os.unlink(partial)
    with reaching(uri):
        if fs.exists(path):
            return False
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError, ValueError):
            fs.pipe_file(path, data)
    return True


def sha256(uri: str, options: Options | None = None) -> str:
    """Content hash of a file, read in pieces."""
    fs, path = filesystem(uri, options)
    digest = hashlib.sha256()
    with reaching(uri), fs.open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
