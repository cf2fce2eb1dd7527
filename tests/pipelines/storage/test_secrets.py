"""Credentials of URIs are neither stored nor shown; what names the object stays."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from deltalake import DeltaTable
from small_runs import as_options, photo
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.settings.loading import load_config
from pipelines.storage import secrets
from pipelines.storage.secrets import hidden, hidden_in, without_credentials

PASSWORD = "hunter2-is-secret"
SIGNATURE = "b0b5c0ffee-is-secret"


@pytest.mark.parametrize(
    "uri, expected",
    [
        ("https://user:pass@host/a.jpg", "https://host/a.jpg"),
        ("https://host/a.jpg?version=3", "https://host/a.jpg?version=3"),
        ("https://host/user@home/a.jpg", "https://host/user@home/a.jpg"),
        ("https://h/a.jpg?X-Amz-Algorithm=x&X-Amz-Date=d&X-Amz-Signature=s&versionId=7", "https://h/a.jpg?versionId=7"),
        ("https://h/a.jpg?AWSAccessKeyId=k&Signature=s&Expires=1", "https://h/a.jpg"),
        ("https://h/a.jpg?X-Goog-Credential=c&X-Goog-Signature=s&generation=12", "https://h/a.jpg?generation=12"),
        ("https://h/a.jpg?sv=2022&st=1&se=2&sr=b&sp=r&sig=s&snapshot=9", "https://h/a.jpg?snapshot=9"),
        ("https://h/a.jpg?se=north&size=2", "https://h/a.jpg?se=north&size=2"),
        ("https://h/a.jpg?access_token=t#part", "https://h/a.jpg#part"),
        ("s3://bucket/a?token=b.jpg", "s3://bucket/a?token=b.jpg"),
        ("abfss://photos@account.dfs.core.windows.net/a.jpg", "abfss://photos@account.dfs.core.windows.net/a.jpg"),
        ("/photos/a?token=1.jpg", "/photos/a?token=1.jpg"),
    ],
)
def test_a_uri_keeps_what_names_the_object(uri: str, expected: str) -> None:
    assert without_credentials(uri) == expected


def test_texts_show_that_something_was_there() -> None:
    text = "GET https://user:pass@host/a.jpg?sig=abc&x=1 failed"
    assert hidden(text) == "GET https://...@host/a.jpg?sig=...&x=1 failed"


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize(
    ("option", "value", "is_secret"),
    [
        ("secret", "hush", True),
        ("account_key", "pqr+/st=", True),
        ("sas_token", "hush", True),
        ("of_a_driver_that_nobody_knows", "a-long-value-of-20-c", True),
        ("endpoint_url", "http://a-long-name-of-a-host:9000", False),
        ("username", "worker", False),
        ("token", "cloud", False),
        ("key", "abc", False),
    ],
)
def test_secrets_of_storage_options_are_hidden_wherever_they_are_said(option: str, value: str, is_secret: bool) -> None:
    pickled = pickle.dumps(load_config([], [f"storage.options.client_kwargs.{option}={value}"]))
    text = f"403: {value} refused"
    assert (hidden(text) == "403: ... refused") == is_secret
    secrets._known.clear()
    assert hidden(text) == text
    pickle.loads(pickled)
    assert (hidden(text) == "403: ... refused") == is_secret, "a worker knows them too"


@pytest.mark.usefixtures("nothing_known")
def test_a_short_secret_takes_no_names_apart() -> None:
    """As people have them for servers that run for tests."""
    secrets.remember({"key": "test", "secret": "test1234"})
    said = "s3://test-bucket/test/a.jpg, tested: key test refused, 'test1234' too, with test."
    assert hidden(said) == "s3://test-bucket/test/a.jpg, tested: key ... refused, '...' too, with ...."


@pytest.mark.usefixtures("nothing_known")
def test_what_signing_makes_of_a_secret_is_hidden() -> None:
    secrets.remember({"sas_token": "sv=2022&sig=pqr+/st="})
    assert hidden("GET https://h/a?x=sv%3D2022%26sig%3Dpqr%2B%2Fst%3D") == "GET https://h/a?x=..."


def test_what_a_job_says_is_hidden_in_all_its_depths() -> None:
    @dataclass(frozen=True)
    class Of:
        uri: str

    said = hidden_in({"s3://a:hush@b": ("s3://a:hush@b", Of("s3://a:hush@b"), 3, None)})
    assert said == {"s3://...@b": ["s3://...@b", Of("s3://...@b"), 3, None]}


class _Guarded(BaseHTTPRequestHandler):
    folder: Path

    def do_GET(self) -> None:
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        expected = "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != expected:
            self.send_error(401)
        elif not path.exists():
            self.send_error(404)
        else:
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(2):
        photo(number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image at all")
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Guarded,), {"folder": folder})) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{http.server_address[1]}"
        http.shutdown()


@pytest.mark.usefixtures("ray")
def test_no_file_of_a_store_and_no_line_has_a_secret(server: str, tmp_path: Path) -> None:
    names = ("0.png", "1.png", "broken.png", "missing.png")
    uris = [f"http://user:{PASSWORD}@{server}/{name}?sig={SIGNATURE}&sv=1&size=9" for name in names]
    (tmp_path / "manifest.csv").write_text("\n".join(["uri", *uris]) + "\n")
    store = tmp_path / "store"
    asked = [str(tmp_path / "manifest.csv"), str(store), *as_options("run.max_failed_fraction=1", "run.attempts=1")]
    result = CliRunner().invoke(app, ["extract", *asked, "--json"])

    assert json.loads(result.stdout)["extracted"] == 2, result.output
    images = DeltaTable(str(store / "images")).to_pandas()
    assert sorted(images["uri"]) == [f"http://{server}/{number}.png?size=9" for number in range(2)]
    assert sorted(images["image_id"]) == sorted(images["uri"])
    assert len(DeltaTable(str(store / "failures")).to_pandas()) == 2
    written = [path for path in store.rglob("*") if path.is_file()]
    for secret in (PASSWORD, SIGNATURE):
        assert secret not in result.output
        assert not [path for path in written if secret.encode() in path.read_bytes()]
    again = CliRunner().invoke(app, ["extract", *asked, "--json"])
    assert json.loads(again.stdout)["already_done"] == 2


def test_the_address_of_weights_is_shown_without_its_password(tmp_path: Path) -> None:
    weights = f"http://user:{PASSWORD}@127.0.0.1:9/weights.pth"
    asked = [str(tmp_path / "in"), str(tmp_path / "store"), "--set", f"model.weights={weights}"]
    (tmp_path / "in").mkdir()
    photo(1).save(tmp_path / "in" / "a.png")
    result = CliRunner().invoke(app, ["extract", *asked])

    assert result.exit_code != 0 and result.stderr.startswith("dinoray: ")
    assert PASSWORD not in result.output
