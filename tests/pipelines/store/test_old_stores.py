"""A store that dinoray 0.1.0 wrote is sound, and jobs go on with it as with one of today."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from old_store import write_old_store
from simulated_jobs import BROKEN, JOBS, Place, extract_from, jobs_in_process, make_inputs
from store_contents import contents_of, differences
from stores import sound


@pytest.fixture(autouse=True)
def in_process() -> Iterator[None]:
    with jobs_in_process():
        yield


@pytest.fixture
def old(tmp_path: Path) -> Place:
    inputs = make_inputs(tmp_path / "inputs")
    broken = {f"{BROKEN['second']}.png": str(inputs / "second")}
    folder = write_old_store(tmp_path / "old", [inputs / "first", inputs / "second"], broken)
    return Place(str(folder), str(inputs))


@pytest.fixture
def new(old: Place, tmp_path: Path) -> Place:
    """The same images, extracted and clustered today."""
    place = Place(str(tmp_path / "new"), old.inputs)
    for job in (extract_from("first"), extract_from("second"), JOBS["cluster"]):
        job(place)
    return place


def same(old: Place, new: Place) -> bool:
    assert sound(Path(old.store)).messages == []
    return differences(contents_of(old.store, old.config()), contents_of(new.store, new.config())) == []


def test_an_old_store_is_sound_and_read_as_it_is(old: Place, new: Place) -> None:
    before = {path: path.read_bytes() for path in Path(old.store).rglob("*") if path.is_file()}
    assert same(old, new)
    assert not Path(old.store, "transactions").exists()
    assert before == {path: path.read_bytes() for path in Path(old.store).rglob("*") if path.is_file()}


def test_jobs_go_on_with_an_old_store(old: Place, new: Place) -> None:
    """New and changed images, images that are gone, clusters brought up to date, files merged: the same in both."""
    for job in (extract_from("third"), JOBS["prune"], JOBS["cluster --update"], JOBS["compact"], JOBS["index build"]):
        assert job(old).status == job(new).status == "done"
        assert same(old, new)
    assert (Path(old.store) / "transactions").is_dir()


@pytest.mark.parametrize("first", ["prune", "cluster --update", "cluster", "compact", "cosegment", "correspond"])
def test_any_job_may_be_the_first_of_today(old: Place, new: Place, first: str) -> None:
    assert JOBS[first](old).exit_code == JOBS[first](new).exit_code == 0
    assert same(old, new)
