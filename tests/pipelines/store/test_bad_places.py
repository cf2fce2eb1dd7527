"""Places that are no store, stores of a newer dinoray, stores that share a prefix, and storage that cannot put a file
only where there is none: every command says so in one sentence, and writes nothing where it should not."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import faulty_proxy
from s3_server import BUCKET, S3Server
from simulated_jobs import JOBS, Place, extract_from, make_store
from store_contents import contents_of, differences

from pipelines.errors import RequestError
from pipelines.upkeep import stats, verify

READING: dict[str, Callable[[Place], Any]] = {
    "verify": lambda place: verify.run(place.config(), store=place.store),
    "stats": lambda place: stats.run(place.config(), store=place.store),
}
WRITING = {name: job for name, job in JOBS.items() if name != "run" and not name.startswith("first")}
COMMANDS = READING | WRITING
ONE_AT_A_TIME = "run only one command that writes to this store at a time"

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def place(template: Place, tmp_path: Path) -> Place:
    return Place(str(shutil.copytree(template.store, tmp_path / "store")), template.inputs)


def files(place: Place) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(place.store).rglob("*") if path.is_file()}


def is_refused(place: Place, command: str, sentence: str) -> None:
    """One sentence, and nothing was written."""
    before = files(place)
    with pytest.raises(RequestError, match=sentence) as refused:
        COMMANDS[command](place)
    said = str(refused.value)
    assert place.store in said and "\n" not in said and len(said) < 400
    assert files(place) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_store_of_a_newer_dinoray(place: Place, command: str) -> None:
    file = Path(place.store, "store.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99}))
    is_refused(place, command, "newer dinoray")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_transaction_of_a_newer_dinoray(place: Place, command: str) -> None:
    newest = max(Path(place.store, "transactions").glob("*.json"))
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"format": 99}))
    is_refused(place, command, "newer dinoray")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_store(place: Place, command: str) -> None:
    Path(place.store, "store.json").unlink()
    is_refused(place, command, "not a dinoray store|no store at")


def test_stores_that_share_a_prefix_leave_each_other_alone(place: Place) -> None:
    """STORE2 beside STORE, and STORE/sub in it."""
    others = [Place(uri, place.inputs) for uri in (f"{place.store}2", f"{place.store}/sub")]
    for other in others:
        make_store(other)
    everything = [place, *others]
    for one in everything:
        rest = [other for other in everything if other is not one]
        before = [contents_of(other.store, other.config()) for other in rest]
        for name in ("prune", "cosegment", "cluster --update", "index update", "compact", "compact"):
            JOBS[name](one)
        for other, then in zip(rest, before, strict=True):
            assert differences(contents_of(other.store, other.config()), then) == []
    for one in everything:
        assert verify.run(one.config(), store=one.store, deep=True).problems == []


@pytest.mark.slow
def test_stores_that_share_a_prefix_of_a_bucket(template: Place, s3: S3Server, tmp_path: Path) -> None:
    """Prefixes of a bucket are no folders: listing `store` must not find `store2`."""
    uris = [f"s3://{BUCKET}/{tmp_path.name}/{name}" for name in ("store", "store2", "store/sub")]
    one, *others = (Place(uri, template.inputs, s3.options) for uri in uris)
    for place in (one, *others):
        make_store(place)
    before = [contents_of(other.store, other.config()) for other in others]
    for name in ("prune", "cluster --update", "compact"):
        JOBS[name](one)
    for other, then in zip(others, before, strict=True):
        assert differences(contents_of(other.store, other.config()), then) == []
    for place in (one, *others):
        assert verify.run(place.config(), store=place.store, deep=True).problems == []


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("without_links")
def test_a_file_system_without_hard_links(place: Place, command: str) -> None:
    """One command at a time works there, and each that changes the store says so once."""
    result = COMMANDS[command](place)
    told = [message for message in result.messages if ONE_AT_A_TIME in message]
    assert len(told) == (command in WRITING), result.messages
    assert result.exit_code == 0
    assert not list(Path(place.store).rglob("*.partial")) and not list(Path(place.store).rglob("probe-*"))
    assert verify.run(place.config(), store=place.store, deep=True).problems == []


@pytest.mark.usefixtures("without_links")
def test_a_store_is_made_without_hard_links(template: Place, tmp_path: Path) -> None:
    place = Place(str(tmp_path / "new"), template.inputs)
    result = extract_from("first")(place)
    assert len([message for message in result.messages if ONE_AT_A_TIME in message]) == 1
    assert verify.run(place.config(), store=place.store, deep=True).images == 3


def test_a_server_that_ignores_conditions_is_noticed(template: Place, s3: S3Server, tmp_path: Path) -> None:
    """By trying: it takes every put, and answers that all is well."""
    with faulty_proxy(s3, ignores_conditions=True) as proxy:
        place = Place(f"s3://{BUCKET}/{tmp_path.name}/store", template.inputs, proxy.server.options)
        for job in (extract_from("first"), JOBS["cluster"], extract_from("second"), JOBS["compact"]):
            result = job(place)
            assert len([message for message in result.messages if ONE_AT_A_TIME in message]) == 1, result.messages
        assert verify.run(place.config(), store=place.store, deep=True).problems == []
    honest = Place(place.store, place.inputs, s3.options)
    assert not any(ONE_AT_A_TIME in message for message in JOBS["prune"](honest).messages)
