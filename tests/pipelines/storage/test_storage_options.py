"""Credentials given once reach both libraries: what delta-rs sends with them, seen by a server on loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from pipelines.storage.files import filesystem
from pipelines.storage.filesystems import delta_options, of_fsspec

Requests = list[tuple[str, str]]  # path with query, Authorization


@pytest.fixture
def listener() -> Iterator[tuple[str, Requests]]:
    """A server that remembers what it was asked and has nothing."""
    seen: Requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization", "")))
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    server.server_close()


def ask(uri: str, options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"."):
        DeltaTable(uri, storage_options=delta_options(uri, options))


@pytest.mark.parametrize(
    ("given", "path", "authorization"),
    [
        ({"account_key": base64.b64encode(b"key").decode()}, "", "SharedKey images:"),
        ({"sas_token": "sv=2024&sig=c2lnbmVk"}, "sig=c2lnbmVk", ""),
    ],
)
def test_azure(listener: tuple[str, Requests], given: dict[str, str], path: str, authorization: str) -> None:
    endpoint, seen = listener
    own = {"AZURE_STORAGE_ENDPOINT": endpoint, "azure_allow_http": "true"}
    ask("az://features/store/images", {"account_name": "images", **given, **own})
    assert seen
    for asked, sent in seen:
        assert path in asked and sent.startswith(authorization), (asked, sent)


def test_azure_with_a_service_principal() -> None:
    given = {"account_name": "images", "client_id": "i", "client_secret": "s", "tenant_id": "t"}
    assert delta_options("az://features/store", given) == {
        "AZURE_STORAGE_ACCOUNT_NAME": "images",
        "AZURE_STORAGE_CLIENT_ID": "i",
        "AZURE_STORAGE_CLIENT_SECRET": "s",
        "AZURE_STORAGE_TENANT_ID": "t",
    }


def test_google(listener: tuple[str, Requests], tmp_path: Path) -> None:
    """The file that fsspec is given as `token` is the one that delta-rs opens: it says where to ask."""
    endpoint, seen = listener
    account = tmp_path / "account.json"
    empty = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    account.write_text(json.dumps({"gcs_base_url": endpoint, "disable_oauth": True, **empty}))
    ask("gs://features/store/images", {"token": str(account)})
    assert seen and all("features" in path for path, _ in seen)


def test_what_delta_rs_alone_knows_does_not_reach_the_driver() -> None:
    options = {"key": "k", "secret": "s", "AWS_REGION": "eu-central-1", "aws_conditional_put": "etag"}
    assert of_fsspec(options) == {"key": "k", "secret": "s"}
    assert delta_options("s3://bucket/store", options)["AWS_REGION"] == "eu-central-1"
    fs, _ = filesystem("s3://bucket/store", options)
    assert "AWS_REGION" not in fs.storage_options and fs.key == "k"


def test_without_credentials_when_asked_for(listener: tuple[str, Requests], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a public bucket: nothing is signed, though there are keys."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    endpoint, seen = listener
    given = {"endpoint_url": endpoint, "AWS_REGION": "us-east-1"}
    ask("s3://features/store/images", {**given, "anon": True})
    assert seen and not any(authorization for _, authorization in seen)
    seen.clear()
    ask("s3://features/store/images", given)
    assert seen and all("Credential=k/" in authorization for _, authorization in seen)


def test_what_was_given_wins_over_files_in_either_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a line of the files that makes no sense is passed over."""
    config = tmp_path / "config"
    config.write_text("[default]\nregion = eu-west-1\nendpoint_url = http://file\nservices = odd\n"
                      "[services odd]\ns3 = no block\n")  # fmt: skip
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    found = delta_options("s3://bucket/store", {"aws_endpoint_url": "http://given"})
    assert {key: value for key, value in found.items() if key.upper() == "AWS_ENDPOINT_URL"} == {
        "aws_endpoint_url": "http://given"
    }
    assert found["AWS_REGION"] == "eu-west-1"
    assert delta_options("s3://bucket/store", {})["AWS_ENDPOINT_URL"] == "http://file"
