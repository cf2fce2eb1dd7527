"""What a run leaves behind and shows meanwhile: its report, the reports of a store, and the progress line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand_made import finished_store
from small_runs import settings

from pipelines.errors import JobError
from pipelines.extract import job as extract
from pipelines.running import progress
from pipelines.running.progress import ProgressLine
from pipelines.running.reports import RunReport, new_run_id, read_reports


def report_of(store: Path | str, run_id: str) -> dict[str, Any]:
    content = json.loads((Path(store) / "runs" / f"{run_id}.json").read_text())
    assert isinstance(content, dict)
    return content


def test_a_report_says_from_the_start_what_was_asked(tmp_path: Path) -> None:
    config = settings("storage.options.secret=hush")
    RunReport("extract", str(tmp_path), config, "r1", {"input": "photos", "limit": 3}).write(fingerprint="f1")
    content = report_of(tmp_path, "r1")
    assert (content["run_id"], content["command"], content["status"]) == ("r1", "extract", "running")
    assert content["asked"] == {"input": "photos", "limit": 3} and content["fingerprint"] == "f1"
    assert content["started_at"] and content["finished_at"] is None
    assert content["settings"]["model"]["name"] == "vit_tiny_patch16_224"
    assert content["dinoray"] and content["machine"]["python"]


def test_a_report_never_holds_secrets(tmp_path: Path) -> None:
    RunReport("extract", str(tmp_path), settings("storage.options.secret=hush"), "r1", {}).finish("done")
    text = (tmp_path / "runs" / "r1.json").read_text()
    assert "secret" in text and "hush" not in text


def test_a_finished_report_keeps_what_it_said_before(tmp_path: Path) -> None:
    report = RunReport("extract", str(tmp_path), settings(), "r1", {"input": "photos"})
    report.write(fingerprint="f1")
    report.finish("done", result={"extracted": 3})
    content = report_of(tmp_path, "r1")
    assert (content["status"], content["result"], content["fingerprint"]) == ("done", {"extracted": 3}, "f1")
    assert content["finished_at"] >= content["started_at"]


def test_run_ids_sort_by_time_and_differ() -> None:
    first, second = new_run_id(), new_run_id()
    assert first != second and first.split("-")[0] <= second.split("-")[0]


def test_reports_are_read_oldest_first(tmp_path: Path) -> None:
    ids = ["20260102T000000Z-aaaaaa", "20250101T000000Z-ffffff", "20260101T000000Z-bbbbbb"]
    for run_id in ids:
        RunReport("extract", str(tmp_path), settings(), run_id, {}).finish("done")
    (tmp_path / "runs" / "notes.txt").write_text("not a report")
    assert [report["run_id"] for report in read_reports(str(tmp_path), settings())] == sorted(ids)


def test_a_store_without_runs_has_no_reports(tmp_path: Path) -> None:
    assert read_reports(str(tmp_path), settings()) == []


def test_a_damaged_report_does_not_hide_the_others(tmp_path: Path) -> None:
    RunReport("extract", str(tmp_path), settings(), "r2", {}).finish("done")
    (tmp_path / "runs" / "r1.json").write_text("{half of a rep")
    damaged, whole = read_reports(str(tmp_path), settings())
    assert (damaged["run_id"], damaged["status"]) == ("r1", "unreadable")
    assert (whole["run_id"], whole["status"]) == ("r2", "done")


@pytest.fixture
def unfinished(photos: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """INPUT with one more image than its STORE has."""
    folder, store = photos(2), tmp_path / "store"
    finished_store(folder, store, settings())
    (folder / "new.jpg").write_bytes((folder / "dog" / "0000.jpg").read_bytes())
    return folder, store


def last_report(store: Path) -> dict[str, Any]:
    return read_reports(str(store), settings())[-1]


def test_a_run_with_nothing_to_do_reports_that(photos: Callable[..., Path], tmp_path: Path) -> None:
    folder, store = photos(2), tmp_path / "store"
    finished_store(folder, store, settings())
    result = extract.run(settings(), input=str(folder), store=str(store), limit=5)
    content = report_of(store, result.run_id)
    assert content["asked"] == {"input": str(folder), "prune": False, "retry_failed": False, "limit": 5}
    assert content["status"] == "done" and content["store"] == str(store)
    counts = {key: content["result"][key] for key in ("listed", "already_done", "pending", "extracted", "failed")}
    assert counts == {"listed": 2, "already_done": 2, "pending": 0, "extracted": 0, "failed": 0}
    assert {"list", "total"} <= content["result"]["seconds"].keys()


def test_a_failed_run_reports_why(unfinished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise JobError("the bucket is gone")

    monkeypatch.setattr(extract, "extract_pending", fails)
    folder, store = unfinished
    with pytest.raises(JobError, match="the bucket is gone"):
        extract.run(settings(), input=str(folder), store=str(store))
    content = last_report(store)
    assert content["status"] == "failed" and content["finished_at"]
    assert content["result"]["messages"] == ["the bucket is gone"] and content["result"]["pending"] == 1


def test_an_interrupted_run_reports_that(unfinished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(extract, "extract_pending", interrupted)
    folder, store = unfinished
    result = extract.run(settings(), input=str(folder), store=str(store))
    assert (result.status, result.exit_code) == ("interrupted", 130)
    content = last_report(store)
    assert content["status"] == "interrupted" and content["result"]["exit_code"] == 130


def test_a_run_that_broke_unexpectedly_reports_a_failure(
    unfinished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(extract, "extract_pending", broken)
    folder, store = unfinished
    with pytest.raises(TypeError, match="a bug"):
        extract.run(settings(), input=str(folder), store=str(store))
    assert last_report(store)["status"] == "failed"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


def test_the_line_says_done_total_rate_failures_and_time_left(clock: Clock) -> None:
    line = ProgressLine(1200)
    clock.now += 10
    line.advance(180, 20)
    assert line.text() == "200 of 1,200 images, 20.0 images/s, 20 failed, 0:00:50 left"


def test_the_line_does_not_guess_before_anything_is_done(clock: Clock) -> None:
    assert ProgressLine(5).text() == "0 of 5 images, 0.0 images/s, 0 failed, ? left"


def test_the_rate_is_that_of_the_last_minute(clock: Clock) -> None:
    line = ProgressLine(10_000)
    for _ in range(100):
        clock.now += 1
        line.advance(1, 0)
    for _ in range(70):
        clock.now += 1
        line.advance(10, 0)
    assert line.images_per_second == pytest.approx(10, rel=0.05)


def test_the_steady_rate_leaves_out_the_start_of_workers(clock: Clock) -> None:
    line = ProgressLine(100)
    clock.now += 30  # Ray starts
    line.advance(10, 0)
    assert line.steady_images_per_second == 0
    clock.now += 4
    line.advance(40, 0)
    assert line.steady_images_per_second == 10


def test_another_attempt_counts_settled_images_only(clock: Clock) -> None:
    line = ProgressLine(100)
    clock.now += 5
    line.advance(60, 0)
    line.restart(40, 1)
    assert line.text().startswith("41 of 100 images, 0.0 images/s, 1 failed")
    clock.now += 10
    line.advance(20, 0)
    assert line.text() == "61 of 100 images, 2.0 images/s, 1 failed, 0:00:20 left"


def test_a_log_gets_a_line_now_and_then(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with ProgressLine(100) as line:
        for _ in range(40):
            clock.now += 1
            line.advance(1, 0)
    assert [text.split(" images")[0] for text in log.getvalue().splitlines()] == ["15 of 100", "30 of 100"]


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressLine(100) as line:
        clock.now += 1
        line.advance(25, 0)
    assert "25 of 100 images" in terminal.getvalue()
