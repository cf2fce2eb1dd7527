"""Trends over runs: who is compared with whom, medians done by hand, what is worth a sentence, and damaged reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import settings
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.running.reports import RunReport
from pipelines.running.trends import Trend, find_trends, moved_lately
from pipelines.store.store import Store


def extraction(
    rate: float = 100.0, *, images: int = 1000, failed: int = 0, size: int = 50, **more: Any
) -> dict[str, Any]:
    """A report of `extract`; size: bytes an image; more: replaces parts of the result."""
    result = {
        "status": "done",
        "extracted": images - failed,
        "failed": failed,
        "images_per_second": rate,
        "bytes_written": size * (images - failed),
        "device": "cpu float32",
        "seconds": {"total": images / rate},
    }
    return {"run_id": "r", "command": "extract", "status": "done", "started_at": "", "result": result | more}


def last(*reports: dict[str, Any]) -> Trend:
    return find_trends(reports)[-1]


def test_the_first_run_is_compared_with_nothing() -> None:
    only = last(extraction(80, images=200, failed=10, size=30))
    assert (only.peers, only.change, only.moved) == (0, {}, ())
    assert (only.work, only.of, only.per_second, only.failed_fraction) == (200, "images", 80, 0.05)
    assert (only.bytes_per_image, only.seconds) == (30, 2.5)


def test_a_change_is_a_part_of_the_median_of_the_runs_before() -> None:
    trend = last(*(extraction(rate) for rate in (90, 100, 110, 1000, 60, 95)), extraction(57.5))
    assert trend.peers == 6
    assert trend.change["per_second"] == pytest.approx(57.5 / 97.5 - 1)
    assert trend.moved == ("extract: 41 % slower than the median of the 6 runs before",)


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        (extraction(150), "extract: 50 % faster than the median of the 3 runs before"),
        (extraction(failed=41), "extract: failures 0.2 % -> 4.1 %"),
        (extraction(size=75), "extract: 50 % more bytes an image than the median of the 3 runs before"),
        (extraction(size=25), "extract: 50 % fewer bytes an image than the median of the 3 runs before"),
    ],
)
def test_what_moves_by_much_is_a_sentence(now: dict[str, Any], sentence: str) -> None:
    assert last(*[extraction(failed=2)] * 3, now).moved == (sentence,)


@pytest.mark.parametrize("now", [extraction(82), extraction(120), extraction(failed=9), extraction(size=60)])
def test_what_moves_a_little_is_none(now: dict[str, Any]) -> None:
    trend = last(*[extraction(failed=2)] * 3, now)
    assert trend.change and trend.moved == ()


def test_failures_that_end_are_told_too() -> None:
    assert last(*[extraction(failed=100)] * 3, extraction()).moved == ("extract: failures 10.0 % -> 0.0 %",)


def test_two_runs_are_too_few_for_a_sentence_but_not_for_a_figure() -> None:
    trend = last(extraction(100), extraction(100), extraction(10))
    assert trend.change["per_second"] == pytest.approx(-0.9) and trend.moved == ()


def test_the_latest_ten_runs_count() -> None:
    trend = last(*[extraction(1)] * 20, *[extraction(100)] * 10, extraction(101))
    assert trend.peers == 10 and trend.change["per_second"] == pytest.approx(0.01)


def test_devices_are_not_compared_with_each_other() -> None:
    trend = last(*[extraction(5000, device="cuda bfloat16")] * 4, extraction(50))
    assert (trend.peers, trend.moved) == (0, ())


def test_a_few_images_are_not_compared_with_many() -> None:
    """Starting workers takes most of a short run's time."""
    trend = last(*[extraction(100, images=100_000)] * 4, *[extraction(4, images=30)] * 3, extraction(4, images=25))
    assert (trend.peers, trend.moved) == (3, ())


def test_runs_that_did_nothing_or_did_not_end_well_are_left_out() -> None:
    nothing = extraction(extracted=0, failed=0, images_per_second=0.0)
    ended = [extraction() | {"status": status} for status in ("running", "failed", "interrupted", "unreadable")]
    unchanged = extraction(status="unchanged")
    trends = find_trends([extraction(), nothing, *ended, unchanged, extraction()])
    assert [trend.peers for trend in trends] == [0, 1]


def test_jobs_are_compared_by_name_and_by_duration_where_they_have_no_rate() -> None:
    def clustering(name: str, seconds: float) -> dict[str, Any]:
        result = {"status": "done", "vectors": 9000, "seconds": {"total": seconds}}
        return {"run_id": "r", "command": "cluster", "status": "done", "asked": {"name": name}, "result": result}

    trends = find_trends([clustering("words", 10), clustering("scenes", 99)] * 3 + [clustering("words", 16)])
    assert trends[-1].peers == 3 and trends[-1].per_second is None
    assert trends[-1].moved == ("cluster words: took 60 % longer than the median of the 3 runs before",)


def test_pairs_have_a_rate_and_evaluations_a_duration() -> None:
    matching = {"command": "correspond", "status": "done", "asked": {"name": "all"}}
    pairs = matching | {"result": {"matched": 40, "pairs_per_second": 2.0, "seconds": {"total": 20.0}}}
    scores = {"command": "evaluate knn", "status": "done", "result": {"seconds": 3.5}}
    first, second = find_trends([pairs, scores])
    assert (first.job, first.of, first.per_second) == ("correspond all", "pairs", 2.0)
    assert (second.job, second.work, second.per_second, second.seconds) == ("evaluate knn", None, None, 3.5)


def test_only_the_last_run_of_a_job_is_spoken_of() -> None:
    slow = [*[extraction()] * 3, extraction(50)]
    assert moved_lately(find_trends(slow)) == ["extract: 50 % slower than the median of the 3 runs before"]
    assert moved_lately(find_trends([*slow, extraction()])) == []


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"run_id": "x", "status": "unreadable"},
        {"command": 7, "status": "done", "result": {}},
        {"command": "extract", "status": "done"},
        {"command": "extract", "status": "done", "result": None},
        {"command": "extract", "status": "done", "result": [1]},
        {"command": "extract", "status": "done", "result": {"extracted": "many", "failed": None, "seconds": {}}},
        {"command": "extract", "status": "done", "result": {"extracted": 5, "seconds": {"total": "long"}}},
        {"command": "extract", "status": "done", "result": {"extracted": -5, "seconds": {"total": float("nan")}}},
    ],
)
def test_damaged_reports_are_passed_over(damaged: dict[str, Any]) -> None:
    trends = find_trends([*[extraction()] * 3, damaged, extraction(50)])
    assert len(trends) == 4 and trends[-1].moved


def test_a_report_with_odd_values_keeps_what_is_right_in_it() -> None:
    odd = extraction(images_per_second="quick", bytes_written=True, device=None)
    trend = last(odd)
    assert (trend.per_second, trend.bytes_per_image, trend.device, trend.seconds) == (None, None, "", 10.0)


@pytest.fixture
def slower(tmp_path: Path) -> str:
    """A store whose last run was half as quick as those before."""
    store = Store.create(str(tmp_path / "store"), settings()).uri
    for number, rate in enumerate([100, 100, 100, 50]):
        report = RunReport("extract", store, settings(), f"r{number}", {})
        report.finish("done", result=extraction(rate)["result"])
    (tmp_path / "store" / "runs" / "r9.json").write_text('{"command": "extract", "status": "done", "result": 3}')
    return store


def test_stats_print_the_last_runs_and_what_moved(slower: str) -> None:
    result = CliRunner().invoke(app, ["stats", slower], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "50.0 (-50%)" in result.stdout and "3 runs" in result.stdout
    assert "extract: 50 % slower than the median of the 3 runs before" in result.stdout


def test_stats_as_json_have_the_trends(slower: str) -> None:
    content = json.loads(CliRunner().invoke(app, ["stats", slower, "--json"]).stdout)
    assert [trend["peers"] for trend in content["trends"]] == [0, 1, 2, 3]
    assert content["trends"][-1]["change"]["per_second"] == pytest.approx(-0.5)
    assert content["moved"] == content["trends"][-1]["moved"] != []
