"""Whether a job is up to date is computed from what it reads and what it left, not remembered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from shown_store import add_clusters, add_matches, add_parts, scenes, shown_store

from pipelines import storage
from pipelines.jobs import JOBS
from pipelines.pipeline import job as pipeline
from pipelines.results.cluster_models import Level, Model, Progress, model_uri, write_model
from pipelines.results.clusters import ClusterTables, training_of
from pipelines.settings.pipeline_file import read_pipeline
from pipelines.store.store import Store

IDS = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four images with clusters, parts and matches, as jobs leave them."""
    made = scenes(IDS)
    store = shown_store(tmp_path / "shown", made)
    clustered(store, "words")
    add_parts(store, made, "things")
    add_matches(store, {(IDS[0], IDS[1]): [0.5, 0.4]}, "nearest")
    return store


@pytest.fixture
def night(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Run a pipeline of some jobs over the store: why each ran, "" for up to date.

    Jobs that need Ray are stand-ins which leave the store as it is.
    """
    monkeypatch.setattr(pipeline._SharedRay, "start", lambda self: None)
    module = pipeline._module

    class StandIn:
        exit_code = 0

        @staticmethod
        def run(*_: Any, **__: Any) -> StandIn:
            return StandIn()

        def as_dict(self) -> dict[str, Any]:
            return {"status": "done"}

    monkeypatch.setattr(pipeline, "_module", lambda job: StandIn if job.job.uses_ray else module(job))

    def run(*jobs: Any) -> dict[str, str]:
        file = tmp_path / "pipeline.yaml"
        file.write_text(yaml.safe_dump({"store": store.uri, "jobs": list(jobs)}))
        result = pipeline.run(read_pipeline(file, {}))
        assert result.exit_code == 0, result.messages
        return {job.title: job.why for job in result.jobs}

    return run


def clustered(store: Store, name: str, first_seed: int = 0) -> None:
    """clusters/NAME with the model that its tables are of."""
    add_clusters(store, scenes(IDS, first_seed=first_seed), name)
    tables = ClusterTables.open_or_make(store.uri, name, {})
    training = training_of(next(iter(tables.assignments.files())))
    model = Model(Progress(training, {"of": "embeddings"}, "images"), [Level(np.eye(3))])
    write_model(model_uri(tables.uri, training), model, {})


def remove(*parts: str) -> Callable[[Store], None]:
    return lambda store: shutil.rmtree(Path(store.uri, *parts))


def cut(pattern: str) -> Callable[[Store], None]:
    """Cut a file of the store to half of its length."""

    def damage(store: Store) -> None:
        file = sorted(Path(store.uri).glob(pattern))[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def unlink(pattern: str) -> Callable[[Store], None]:
    return lambda store: sorted(Path(store.uri).glob(pattern))[0].unlink()


CLUSTER = {"cluster": {"name": "words"}}
COSEGMENT = {"cosegment": {"name": "things"}}
CORRESPOND = {"correspond": {"name": "nearest"}}
INDEX = {"index": {"name": "images"}}


@pytest.mark.parametrize(
    ("job", "title", "damage", "why"),
    [
        (CLUSTER, "cluster words", remove("clusters", "words"), "clusters/words is gone"),
        (CLUSTER, "cluster words", cut("clusters/words/assignments/*.parquet"), "its log says"),
        (CLUSTER, "cluster words", remove("clusters", "words", "model"), "is gone"),
        (COSEGMENT, "cosegment things", remove("parts", "things"), "parts/things is gone"),
        (COSEGMENT, "cosegment things", cut("parts/things/patches/*.parquet"), "its log says"),
        (CORRESPOND, "correspond nearest", remove("matches", "nearest"), "matches/nearest is gone"),
        (INDEX, "index images", remove("index", "images"), "index/images is gone"),
        (INDEX, "index images", cut("index/images/manifest-1.json"), "damaged"),
        (INDEX, "index images", unlink("index/images/*.faiss"), "is missing"),
        ("report", "report", unlink("report.html"), "report.html is gone"),
        ("report", "report", cut("report.html"), "report.html was changed or damaged since"),
    ],
)
def test_results_that_are_gone_or_damaged_are_made_again(
    night: Callable[..., dict[str, str]], store: Store, job: Any, title: str, damage: Callable[[Store], None], why: str
) -> None:
    """And not taken for up to date, as a pipeline sees neither in the tables."""
    assert night(job)[title] == "did not run before in this pipeline"
    assert night(job)[title] == ""
    damage(store)
    if why == "damaged":  # what the job itself says of a manifest that it cannot read ends the run
        with pytest.raises(AssertionError, match="which mends what can be mended"):
            night(job)
        return
    assert why in night(job)[title]


def test_a_clustering_that_sets_name_is_read(night: Callable[..., dict[str, str]], store: Store) -> None:
    """Sets by cluster are outdated by another training of the clusters."""
    job = {"cosegment": {"name": "things", "sets": "cluster:words"}}
    night(job)
    assert night(job)["cosegment things"] == ""
    shutil.rmtree(Path(store.uri, "clusters", "words"))
    clustered(store, "words", first_seed=7)
    assert night(job)["cosegment things"] == "clusters/words changed since"
    assert night(job)["cosegment things"] == ""


@pytest.mark.parametrize("by_setting", [False, True])
def test_a_file_that_a_job_names_is_read(
    night: Callable[..., dict[str, str]], store: Store, tmp_path: Path, by_setting: bool
) -> None:
    """Matches of listed pairs are outdated by what is written into the list."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f"image_a,image_b\n{IDS[0]},{IDS[1]}\n")
    given = {"settings": {"correspond": {"pairs": str(pairs)}}} if by_setting else {"pairs": str(pairs)}
    job = {"correspond": {"name": "nearest", **given}}
    night(job)
    assert night(job)["correspond nearest"] == ""
    pairs.write_text(f"image_a,image_b\n{IDS[0]},{IDS[2]}\n")
    assert night(job)["correspond nearest"] == f"{pairs} changed since"
    pairs.unlink()
    assert night(job)["correspond nearest"] == f"{pairs} changed since", "the job says what is wrong"


def test_a_note_shows_no_credentials(
    night: Callable[..., dict[str, str]], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that a job reads, and of one that it wrote."""
    monkeypatch.setattr(storage, "sha256", lambda *_: "0" * 64)
    jobs = [{"correspond": {"name": "nearest", "pairs": "https://me:hush@host/pairs.csv"}}]
    jobs += [{"cosegment": {"name": "things", "sets": "s3://key:hush@bucket/sets.csv"}}]
    night(*jobs)
    assert night(*jobs) == {"correspond nearest": "", "cosegment things": ""}
    notes = [note.read_text() for note in Path(store.uri, "pipeline").iterdir()]
    assert len(notes) == 2 and "...@bucket/sets.csv" in "".join(notes) and "hush" not in "".join(notes)


def test_a_table_that_was_made_again_is_another_one(night: Callable[..., dict[str, str]], store: Store) -> None:
    """Its versions begin again, and may be the same number."""
    night(CLUSTER)
    shutil.rmtree(Path(store.uri, "clusters", "words"))
    clustered(store, "words")
    assert night(CLUSTER)["cluster words"] == "clusters/words was changed or damaged since"


def test_a_note_of_an_older_dinoray_is_as_none(night: Callable[..., dict[str, str]], store: Store) -> None:
    night(CLUSTER)
    (note,) = Path(store.uri, "pipeline").glob("*.json")
    note.write_text(json.dumps({"settings": "0" * 16, "versions": {"images": 1}}))
    assert night(CLUSTER)["cluster words"] == "did not run before in this pipeline"


def test_every_job_that_makes_something_reads_something() -> None:
    """Else it would never be up to date, or always."""
    for job in JOBS.values():
        assert bool(job.makes or job.output) <= bool(job.reads), job.command
        assert not job.in_pipelines or job.always_runs or job.makes or job.output, job.command
