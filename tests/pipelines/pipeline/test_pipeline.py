"""run: jobs in order, each only where there is something to do, and exit codes that schedulers understand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hand_made import add_images, source
from repository import ROOT
from shown_store import add_matches
from small_runs import SMALL_MODEL, settings
from stores import sound
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.errors import JobError, RequestError
from pipelines.pipeline import job as pipeline
from pipelines.running.reports import read_reports
from pipelines.settings.loading import load_settings
from pipelines.settings.pipeline_file import read_pipeline
from pipelines.store.store import Store


def written(folder: Path, content: Any) -> Path:
    file = folder / "pipeline.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


@dataclass
class Done:
    """What a stand-in for a job says that it did."""

    exit_code: int = 0
    status: str = "done"
    extracted: int = 1
    pruned: int = 0
    run_id: str = "20260101T000000Z-000000"
    messages: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class Jobs:
    """Stand-ins for all jobs, which remember how they were called and do as they are told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}

    def module(self, job: Any) -> Any:
        jobs = self

        class Module:
            @staticmethod
            def run(config: Any, **arguments: Any) -> Any:
                jobs.calls.append((job.title, arguments))
                answer = jobs.answers.get(job.title, Done())
                if isinstance(answer, BaseException):
                    raise answer
                return answer

        return Module

    def ran(self) -> list[str]:
        titles = [title for title, _ in self.calls]
        self.calls.clear()
        return titles


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    stand_ins = Jobs()
    monkeypatch.setattr(pipeline, "_module", stand_ins.module)
    monkeypatch.setattr(pipeline._SharedRay, "start", lambda self: None)
    return stand_ins


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(str(tmp_path / "store"), settings())
    add_images(made, "20260101T000000Z-000000", [source("a.jpg")])
    return made


def asked(store: Store, *jobs: Any, **more: Any) -> dict[str, Any]:
    return {"store": store.uri, "settings": load_settings([], SMALL_MODEL), "jobs": list(jobs), **more}


ALL = ({"extract": {"input": "photos"}}, {"index": {"name": "images"}}, {"cluster": {"name": "words", "update": True}})


def run(file: Path, **options: Any) -> pipeline.Result:
    return pipeline.run(read_pipeline(file, options.pop("settings", {})), **options)


def test_jobs_run_in_order_and_then_only_where_something_changed(tmp_path: Path, jobs: Jobs, store: Store) -> None:
    file = written(tmp_path, asked(store, *ALL))
    assert run(file).status == "done"
    assert jobs.calls == [
        ("extract", {"store": store.uri, "input": "photos"}),
        ("index images", {"store": store.uri, "name": "images"}),
        ("cluster words", {"store": store.uri, "name": "words", "update": True}),
    ]
    jobs.ran()

    jobs.answers["extract"] = Done(extracted=0)
    again = run(file)
    assert (again.status, again.exit_code) == ("unchanged", 0)
    assert [job.status for job in again.jobs] == ["unchanged", "unchanged", "unchanged"]
    assert jobs.ran() == ["extract"]

    add_images(store, "20260102T000000Z-000000", [source("b.jpg")])
    assert run(file).jobs[1].why == "images and patches changed since"
    assert jobs.ran() == ["extract", "index images", "cluster words"]


def test_a_job_takes_the_arguments_of_its_command(tmp_path: Path, jobs: Jobs, store: Store) -> None:
    """Several of one that takes many, and those that stand for settings, which win over the job's settings."""
    of_cluster = {"name": "words", "k": 5, "of": "embeddings", "settings": {"cluster": {"k": 7, "seed": 3}}}
    file = written(tmp_path, asked(store, {"report": {"images": ["a.jpg", "b.jpg"]}}, {"cluster": of_cluster}))
    report, cluster = read_pipeline(file, {}).jobs
    assert report.arguments == {"images": ["a.jpg", "b.jpg"]} and cluster.arguments == {"name": "words"}
    settings = cluster.config.cluster
    assert (settings.k, settings.of, settings.seed) == (5, "embeddings", 3)
    assert read_pipeline(file, {"cluster": {"k": 9}}).jobs[1].config.cluster.k == 9, "the command line wins"
    run(file)
    file.write_text(file.read_text().replace("k: 5", "k: 6"))
    assert run(file).jobs[1].why == "its settings changed"


def test_other_settings_of_a_job_make_it_run_and_no_other(tmp_path: Path, jobs: Jobs, store: Store) -> None:
    file = written(tmp_path, asked(store, *ALL))
    run(file)
    jobs.ran()
    done = run(file, settings={"cluster": {"k": 7}})
    assert jobs.ran() == ["extract", "cluster words"]
    assert done.jobs[2].why == "its settings changed"
    run(file, settings={"cluster": {"k": 7}, "run": {"workers": 1}})  # which decide nothing of the result
    assert jobs.ran() == ["extract"]


def test_a_report_is_made_again_when_anything_that_it_shows_changed(tmp_path: Path, jobs: Jobs, store: Store) -> None:
    file = written(tmp_path, asked(store, "report", {"report": {"output": "cats.html", "sample": 5}}))
    assert run(file).status == "done"
    assert jobs.ran() == ["report", "report cats.html"]
    assert run(file).status == "unchanged" and jobs.ran() == []
    add_matches(store, {("a.jpg", "b.jpg"): [0.5]})
    assert run(file).jobs[1].why == "matches/nearest changed since" and jobs.ran() == ["report", "report cats.html"]
    assert run(file, settings={"report": {"pairs": 3}}).status == "done" and len(jobs.ran()) == 2
    assert run(file).jobs[0].why == "its settings changed"
    shutil.rmtree(Path(store.uri, "matches"))
    jobs.ran()
    assert run(file).jobs[0].why == "matches/nearest changed since"


def test_what_changes_while_a_job_runs_is_seen_the_next_time(
    tmp_path: Path, jobs: Jobs, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, asked(store, {"index": {"name": "images"}}))
    module = jobs.module

    def meanwhile(job: Any) -> Any:
        add_images(store, "20260102T000000Z-000000", [source("b.jpg")])
        monkeypatch.setattr(pipeline, "_module", module)
        return module(job)

    monkeypatch.setattr(pipeline, "_module", meanwhile)
    run(file)
    run(file)
    assert jobs.ran() == ["index images", "index images"]
    assert run(file).status == "unchanged"


def test_a_job_that_fails_ends_the_pipeline_and_is_run_again(tmp_path: Path, jobs: Jobs, store: Store) -> None:
    jobs.answers["index images"] = JobError("The disk is full.")
    file = written(tmp_path, asked(store, *ALL))
    failed = run(file)
    assert (failed.status, failed.exit_code) == ("failed", 1)
    assert [job.status for job in failed.jobs] == ["done", "failed", "not_run"]
    assert "The disk is full." in failed.messages[0]
    jobs.ran()
    jobs.answers.clear()
    assert run(file).exit_code == 0
    assert jobs.ran() == ["extract", "index images", "cluster words"]


@pytest.mark.parametrize(("answer", "code"), [(RequestError("no"), 2), (Done(exit_code=1), 1)])
def test_exit_codes_of_failures(tmp_path: Path, jobs: Jobs, store: Store, answer: Any, code: int) -> None:
    jobs.answers["extract"] = answer
    result = run(written(tmp_path, asked(store, *ALL)))
    assert result.exit_code == code and jobs.ran() == ["extract"]


def test_images_that_failed_do_not_stop_what_follows(tmp_path: Path, jobs: Jobs, store: Store) -> None:
    jobs.answers["extract"] = Done(exit_code=3)
    result = run(written(tmp_path, asked(store, *ALL)))
    assert (result.status, result.exit_code) == ("done", 3)
    assert jobs.ran() == ["extract", "index images", "cluster words"]


@pytest.mark.parametrize("answer", [KeyboardInterrupt(), Done(exit_code=130, status="interrupted")])
def test_an_interruption_is_one_of_the_whole(tmp_path: Path, jobs: Jobs, store: Store, answer: Any) -> None:
    jobs.answers["index images"] = answer
    result = run(written(tmp_path, asked(store, *ALL)))
    assert (result.status, result.exit_code) == ("interrupted", 130)
    assert [job.status for job in result.jobs] == ["done", "interrupted", "not_run"]


def report_of(store: Store) -> dict[str, Any]:
    (report,) = [one for one in read_reports(store.uri, settings()) if one["command"] == "run"]
    return report


def test_a_bug_keeps_its_traceback_and_is_in_the_report(tmp_path: Path, jobs: Jobs, store: Store) -> None:
    jobs.answers["extract"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run(written(tmp_path, asked(store, *ALL)))
    report = report_of(store)
    assert report["status"] == "failed"
    assert [job["status"] for job in report["result"]["jobs"]] == ["failed", "not_run", "not_run"]


class Unreachable(OSError):
    """As the libraries of storage drivers have them."""


Unreachable.__module__ = "botocore.exceptions"


@pytest.mark.parametrize("step", ["why_to_run", "state_before", "remember", "start"])
@pytest.mark.parametrize(
    ("error", "says"),
    [(JobError("The log is damaged."), "The log is damaged."), (Unreachable("no route"), "could not be reached")],
)
def test_what_fails_around_a_job_is_its_failure(
    step: str, error: Exception, says: str, tmp_path: Path, jobs: Jobs, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(pipeline._SharedRay if step == "start" else pipeline, step, fails)
    result = run(written(tmp_path, asked(store, *ALL)))
    assert (result.status, result.exit_code) == ("failed", 1)
    assert [job.status for job in result.jobs] == ["failed", "not_run", "not_run"]
    assert says in result.jobs[0].why and says in result.messages[0]
    assert report_of(store)["result"]["messages"] == result.messages


def test_a_plan_whose_store_cannot_be_looked_at_says_so(
    tmp_path: Path, jobs: Jobs, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise Unreachable("no route")

    monkeypatch.setattr(pipeline, "why_to_run", fails)
    result = run(written(tmp_path, asked(store, *ALL)), dry_run=True)
    assert result.status == "dry_run" and [job.status for job in result.jobs] == ["would_fail"] * 3
    assert not Path(store.uri, "runs").exists()


def test_a_pipeline_that_makes_no_store_leaves_nothing(tmp_path: Path, jobs: Jobs) -> None:
    jobs.answers["extract"] = RequestError("There is no INPUT.")
    content = {"store": str(tmp_path / "store"), "jobs": [{"extract": {"input": "photos"}}]}
    assert run(written(tmp_path, content)).status == "failed"
    assert not (tmp_path / "store").exists()


def test_the_report_says_what_became_of_every_job(tmp_path: Path, jobs: Jobs, store: Store) -> None:
    result = run(written(tmp_path, asked(store, *ALL)))
    report = json.loads(Path(store.uri, "runs", f"{result.run_id}.json").read_text())
    assert (report["command"], report["status"]) == ("run", "done")
    assert [job["status"] for job in report["result"]["jobs"]] == ["done", "done", "done"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("jobs: [extract]", "has no store"),
        ("store: s", "has no jobs"),
        ("store: s\njobs: []", "has no jobs"),
        ("store: s\njobs: [{extract: {}}]", "(extract): input is missing: give INPUT"),
        ("store: s\njobs: [{extract: {input: a, limit: -1}}]", "(extract): limit is -1, but should be at least 1"),
        ("store: s\njobs: [{extract: {input: [a, b]}}]", "input is ['a', 'b'], but should be a text"),
        ("store: s\njobs: [{report: {images: [a, 3]}}]", "images is 3, but should be a text"),
        ("store: s\njobs: [{cluster: {name: words, k: many}}]", "k is 'many', but should be a whole number"),
        ("store: s\njobs: [{exract: {input: a}}]", "did you mean extract?"),
        ("store: s\njobs: [{index: {nam: a}}]", "did you mean name?"),
        ("store: s\njobs: [{index: {name: a}}, {index: {name: a}}]", "has the job index a twice"),
        ("store: s\njobs: [{extract: {input: a, prune: maybe}}]", "prune is 'maybe'"),
        ("store: s\njobs: [{extract: {input: a, limit: true}}]", "limit is True"),
        ("store: s\njobs: [{index: {name: a}, compact: null}]", "must be one command"),
        ("store: s\njobs: [3]", "must be one command"),
        ("store: s\nsetings: {}\njobs: [compact]", "did you mean settings?"),
        ("store: s\nsettings: {cluster: {kk: 1}}\njobs: [compact]", "did you mean cluster.k?"),
        ("store: s\njobs: [{cluster: {name: a, settings: {run: {address: auto}}}}]", "share one Ray"),
        ("store: s\njobs: [{cluster: {name: a, settings: {run: {object_store_gb: 2}}}}]", "a run.object_store_gb of"),
        ("store: s\njobs: [{index: {name: a, settings: 3}}]", "must be keys with values"),
        ("store: [", "is not valid YAML"),
        ("just text", "must hold sections"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, content: str, says: str) -> None:
    result = CliRunner().invoke(app, ["run", str(written(tmp_path, content))])
    assert result.exit_code == 2 and says in result.stderr and "Traceback" not in result.stderr


def test_the_ray_of_a_pipeline_is_given_for_all_its_jobs(tmp_path: Path) -> None:
    """Here as the same for each job, and on the command line."""
    own = {"cluster": {"name": "words", "settings": {"run": {"address": "auto", "workers": 2}}}}
    content = {"store": "s", "settings": {"run": {"address": "auto"}}, "jobs": [own]}
    (job,) = read_pipeline(written(tmp_path, content), {}).jobs
    assert (job.config.run.address, job.config.run.workers) == ("auto", 2)
    (job,) = read_pipeline(written(tmp_path, content), {"run": {"address": "head:6379"}}).jobs
    assert job.config.run.address == "head:6379"


def test_the_example_is_a_pipeline() -> None:
    found = read_pipeline(ROOT / "configs" / "nightly.yaml", {})
    assert [job.command for job in found.jobs] == [
        *("extract", "index", "cluster", "cosegment", "correspond", "compact", "report", "verify")
    ]
    assert found.jobs[2].config.cluster.k == 1000 and found.jobs[2].config.run.max_failed_fraction == 0.05


@pytest.mark.slow
def test_real_jobs_twice(tmp_path: Path, photos: Callable[..., Path], ray: None) -> None:
    """The first night makes everything, the second does nothing, the third what is new."""
    folder, store = photos(6), tmp_path / "store"
    jobs = [
        {"extract": {"input": str(folder)}},
        {"index": {"name": "images"}},
        {"cluster": {"name": "words", "update": True, "settings": {"cluster": {"k": 3}}}},
        "compact",
        "verify",
    ]
    file = written(tmp_path, {"store": str(store), "settings": load_settings([], SMALL_MODEL), "jobs": jobs})
    runner = CliRunner()

    planned = runner.invoke(app, ["run", str(file), "--dry-run"])
    assert planned.exit_code == 0 and "Nothing was written" in planned.stdout and not store.exists()

    def night() -> list[str]:
        result = runner.invoke(app, ["run", str(file), "--json"])
        assert result.exit_code == 0, result.stderr
        return [job["status"] for job in json.loads(result.stdout)["jobs"]]

    assert night() == ["done", "done", "done", "unchanged", "done"]
    assert night() == ["unchanged", "unchanged", "unchanged", "unchanged", "done"]
    photos(8)
    assert night()[:3] == ["done", "done", "done"]
    assert sound(store).images == 8
