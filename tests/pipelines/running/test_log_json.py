"""--log-json: every line of standard error is one object, whatever writes it, and no line shows a secret."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hand_made import finished_store
from small_runs import as_options, settings
from typer.testing import CliRunner, Result

from pipelines.cli import app, evaluate
from pipelines.errors import JobError
from pipelines.running import json_log, progress
from pipelines.running.progress import ProgressLine, StatusLine
from pipelines.upkeep import verify

DINORAY = str(Path(sys.executable).with_name("dinoray"))


def dinoray(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines_of(text: str) -> list[dict[str, Any]]:
    """The objects that a log is; anything else in it is an error."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert isinstance(line, dict) and {"time", "level", "event", "command"} <= line.keys()
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
        assert line["level"] in ("info", "warning", "error", "critical")
    return lines


@pytest.fixture
def done(photos: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """INPUT, and a STORE in which all of it is done."""
    source, store = photos(3), tmp_path / "store"
    finished_store(source, store, settings())
    return source, store


def names() -> list[list[str]]:
    tasks = [["evaluate", made.name or ""] for made in evaluate.registered_commands]
    return [[made.callback.__name__] for made in app.registered_commands if made.callback] + tasks


@pytest.mark.parametrize("command", names(), ids=" ".join)
def test_every_command_takes_it(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "--log-json" in result.stdout


def test_a_run_starts_says_and_finishes(done: tuple[Path, Path]) -> None:
    source, store = done
    (source / "notes.txt").write_text("skipped")
    result = dinoray("extract", source, store, "--log-json", "--json", *as_options())
    content = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    started, message, finished = lines_of(result.stderr)
    assert (started["event"], started["level"], started["command"]) == ("started", "info", "extract")
    assert (message["event"], message["level"]) == ("message", "warning") and "1 .txt" in message["message"]
    assert (finished["event"], finished["status"], finished["exit_code"]) == ("finished", "done", 0)
    for key in ("run_id", "listed", "already_done", "extracted", "failed", "bytes_read", "images_per_second"):
        assert finished[key] == content[key]
    assert finished["seconds"] == content["seconds"]["total"]


def test_what_people_read_on_standard_output_stays(done: tuple[Path, Path]) -> None:
    result = dinoray("verify", done[1], "--log-json")
    assert "is sound: 3 images" in result.stdout
    assert [line["event"] for line in lines_of(result.stderr)] == ["started", "finished"]


@pytest.mark.parametrize(
    ("arguments", "command", "message"),
    [
        (["verify", "/nowhere/at/all"], "verify", "no store"),
        (["extract", "/nowhere/at/all", "/tmp/store"], "extract", "does not exist"),
        (["settings", "--set", "model.nam=x"], "settings", "did you mean model.name"),
        (["verify"], "verify", "Missing argument"),
        (["verify", "store", "--fast"], "verify", "No such option"),
        (["search", "a", "b", "c", "--top", "many"], "search", "valid integer"),
        (["polish"], "polish", "No such command"),
        (["evaluate", "beauty", "store"], "evaluate beauty", "There is no task 'beauty'"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: list[str], command: str, message: str) -> None:
    result = dinoray(*arguments, "--log-json", "--json")
    assert result.exit_code == 2
    _, line = lines_of(result.stderr)
    assert (line["event"], line["level"], line["exit_code"]) == ("failed", "error", 2)
    assert line["command"] == command and message in line["message"]
    assert json.loads(result.stdout) == {"error": line["message"], "exit_code": 2}


def test_a_failed_job_is_one_line(done: tuple[Path, Path]) -> None:
    (done[1] / "store.json").write_text("{half of")
    result = dinoray("verify", done[1], "--log-json")
    assert result.exit_code == 1
    assert lines_of(result.stderr)[-1]["level"] == "error" and "Traceback" not in result.output


def test_an_interruption_is_one_line(done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "run", interrupted)
    result = dinoray("verify", done[1], "--log-json")
    assert result.exit_code == 130
    assert (lines_of(result.stderr)[-1]["message"], lines_of(result.stderr)[-1]["exit_code"]) == ("interrupted", 130)


def test_a_bug_keeps_its_traceback_inside_its_line(done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise TypeError("a bug\nof two lines")

    monkeypatch.setattr(verify, "run", broken)
    result = dinoray("verify", done[1], "--log-json")
    assert result.exit_code == 1
    line = lines_of(result.stderr)[-1]
    assert (line["level"], line["message"]) == ("critical", "TypeError: a bug of two lines")
    assert "in broken" in line["traceback"]


def test_warnings_records_and_prints_of_libraries_are_lines(
    done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(*arguments: object, **more: object) -> Any:
        warnings.warn("the weather\nchanges", UserWarning, stacklevel=1)
        logging.getLogger("another_package").warning("disk %s is slow", "sda")
        logging.getLogger("another_package").info("nothing of interest")
        try:
            raise OSError("gone")
        except OSError:
            logging.getLogger("another_package").exception("a read failed")
        print("12 %\r50 %\r100 %\n\nprinted, and", file=sys.stderr)
        print("not ended", end="", file=sys.stderr)
        return checked

    checked = verify.run(settings(), store=str(done[1]))
    monkeypatch.setattr(verify, "run", noisy)
    result = dinoray("verify", done[1], "--log-json")
    assert result.exit_code == 0, result.output
    lines = [line for line in lines_of(result.stderr) if line["event"] == "message"]
    warned, slow, failed, *printed = lines
    assert warned["level"] == "warning" and "UserWarning: the weather changes" in warned["message"]
    assert (slow["message"], slow["logger"]) == ("disk sda is slow", "another_package")
    assert failed["level"] == "error" and "OSError: gone" in failed["traceback"]
    assert [line["message"] for line in printed[:4]] == ["12 %", "50 %", "100 %", "printed, and"]
    assert "not ended" in result.stderr


def test_afterwards_everything_is_as_before(done: tuple[Path, Path]) -> None:
    before = (sys.stderr, logging.getLogger().handlers[:], warnings.showwarning)
    dinoray("verify", done[1], "--log-json")
    assert (sys.stderr, logging.getLogger().handlers, warnings.showwarning) == before
    assert not json_log.active()
    assert "dinoray: " in dinoray("verify", "/nowhere/at/all").stderr


SECRETS = [
    ["--set", "storage.options.secret=hush-hush"],
    ["--set", "storage.options.client_kwargs.aws_secret=hush-hush"],
    ["--set", "storage.option.secret=hush-hush"],
    ["--set", "storage.options.secret=[hush-hush"],
]


@pytest.mark.parametrize("options", SECRETS, ids=" ".join)
def test_storage_options_never_appear(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*arguments: object, **more: object) -> None:
        raise OSError("refused: key hush-hush at http://minio:9000")

    monkeypatch.setattr(verify, "run", careless)
    endpoint = ["--set", "storage.options.endpoint_url=http://minio:9000"]
    result = dinoray("verify", "store", "--log-json", *endpoint, *options)
    assert result.exit_code and "hush-hush" not in result.stderr
    assert "hush-hush" not in json.dumps(lines_of(result.stderr))


def test_storage_options_of_a_pipeline_never_appear(
    done: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(*arguments: object, **more: object) -> None:
        raise JobError("refused: key hush-hush, then key hush-too")

    monkeypatch.setattr(verify, "run", careless)
    file = tmp_path / "pipeline.yaml"
    own = "verify: {settings: {storage: {options: {password: hush-too}}}}"
    options = "settings: {storage: {options: {secret: hush-hush}}}"
    file.write_text(f"store: {done[1]}\n{options}\njobs: [{own}]\n")
    result = dinoray("run", file, "--log-json", "--json")
    messages = [line["message"] for line in lines_of(result.stderr) if "message" in line]
    assert result.exit_code == 1 and "refused: key ..., then key ..." in messages[-1]
    assert "hush" not in result.output


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("s3://AKIA:hush@bucket/a is gone", "s3://...@bucket/a is gone"),
        ("https://h/a.jpg?X-Amz-Signature=hush&X-Amz-Date=1", "https://h/a.jpg?X-Amz-Signature=...&X-Amz-Date=1"),
        ("https://h/a?w=3&sig=hush", "https://h/a?w=3&sig=..."),
        ("images of s3://bucket/photos@2x/a.jpg", "images of s3://bucket/photos@2x/a.jpg"),
    ],
)
def test_credentials_in_uris_never_appear(said: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with json_log.json_log("extract"):
        json_log.event("message", said)
        json_log.event("message", uris=[said])
    first, second = lines_of(log.getvalue())
    assert first["message"] == shown and second["uris"] == [shown]


def test_numbers_that_are_none_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with json_log.json_log("train"):
        json_log.event("progress", loss=float("nan"), rate=float("inf"), seconds={"total": 0.1 + 0.2})
    (line,) = lines_of(log.getvalue())
    assert (line["loss"], line["rate"], line["seconds"]) == (None, None, {"total": 0.3})


def test_a_result_with_a_name_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of index, cluster and the other jobs that have one; also where no lines are asked for, as in `run`."""
    result = {"name": "images", "status": "done", "exit_code": 0, "vectors": 3}
    json_log.finished(result)
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with json_log.json_log("run"):
        json_log.finished(result, command="index")
    line = lines_of(log.getvalue())[-1]
    assert (line["name"], line["command"], line["vectors"]) == ("images", "index", 3)


def test_progress_is_lines_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), 100.0
    monkeypatch.setattr(log, "isatty", lambda: True)  # no bar, even on a terminal
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with json_log.json_log("extract"), json_log.about(run_id="r1"), ProgressLine(1000) as line:
        now += 20
        line.advance(180, 20)
        line.say("half of them are old")
        with StatusLine() as status:
            now += 100
            status.show("merging")
    shown, said, status_line = lines_of(log.getvalue())
    assert (shown["event"], shown["run_id"], shown["images"], shown["failed"]) == ("progress", "r1", 180, 20)
    assert (shown["total"], shown["images_per_second"], shown["seconds"], shown["seconds_left"]) == (1000, 10, 20, 80)
    assert (said["message"], status_line["message"]) == ("half of them are old", "merging")


@pytest.mark.slow
def test_an_extraction_with_ray_writes_nothing_but_lines(photos: Callable[..., Path], tmp_path: Path) -> None:
    folder, store = photos(6), tmp_path / "store"
    (folder / "broken.jpg").write_bytes(b"no image")
    command = [DINORAY, "extract", str(folder), str(store), "--log-json", "--json"]
    options = as_options("run.max_failed_fraction=0.5")
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    finished = lines_of(done.stderr)[-1]
    content = json.loads(done.stdout)
    assert (finished["event"], finished["extracted"], finished["failed"]) == ("finished", 6, 1)
    assert finished["run_id"] == content["run_id"] and finished["images_per_second"] == content["images_per_second"]
