"""Arguments of jobs: what the command line, pipelines and Python give is checked and split in one way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import RequestError
from pipelines.jobs import JOBS
from pipelines.settings.arguments import split_arguments


def split(command: str, **given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return split_arguments(JOBS[command], given)


def test_arguments_that_stand_for_settings_are_apart() -> None:
    arguments, settings = split("cluster", store="s", name="words", k=3, of=None, update=True)
    assert arguments == {"store": "s", "name": "words", "update": True} and settings == {"cluster.k": 3}


def test_what_is_none_or_not_there_was_not_given() -> None:
    assert split("extract", input="a", store="b", limit=None) == ({"input": "a", "store": "b"}, {})


@pytest.mark.parametrize("images", [["a", "b"], ("a", "b"), iter(["a", "b"]), [Path("a"), "b"]])
def test_several_of_one_that_takes_many_are_a_list(images: Any) -> None:
    assert split("report", store="s", images=images)[0]["images"] == ["a", "b"]


@pytest.mark.parametrize("image", ["ab", Path("ab")])
def test_one_of_many_is_a_list_too(image: Any) -> None:
    assert split("report", store="s", images=image)[0]["images"] == ["ab"]


def test_paths_and_numbers_of_numpy_are_plain() -> None:
    arguments, _ = split("extract", input=Path("/photos"), store=Path("features"), limit=np.int64(3))
    assert arguments == {"input": "/photos", "store": "features", "limit": 3}
    assert type(arguments["limit"]) is int
    assert split("estimate", input="a", store="b", price=3)[0]["price"] == 3.0


@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        ("extract", {"limit": 0}, "limit is 0, but should be at least 1."),
        ("extract", {"limit": True}, "limit is True, but should be a whole number."),
        ("extract", {"limit": 2.5}, "limit is 2.5, but should be a whole number."),
        ("extract", {"prune": 1}, "prune is 1, but should be true or false."),
        ("extract", {"input": 3}, "input is 3, but should be a text."),
        ("extract", {"input": ""}, "input is missing: give INPUT."),
        ("estimate", {"sample": 0}, "sample is 0, but should be at least 1."),
        ("estimate", {"price": float("nan")}, "price is nan, but should be at least 0."),
        ("cluster", {"k": -1}, "k is -1, but should be at least 1."),
        ("evaluate pck", {"annotations": None}, "annotations is missing: give PATH."),
        ("report", {"images": ["a", None]}, "images is None, but should be a text."),
    ],
)
def test_what_does_not_fit_is_one_sentence(command: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        split(command, **given)
    assert str(caught.value) == says
