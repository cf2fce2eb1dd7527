"""A default that stands in the settings and in a signature of dino_ops is the same in both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dino_ops.correspondences import find_correspondences
from dino_ops.cosegmentation import fit_foreground
from dino_ops.extractor import Extractor
from dino_ops.images import ImageSpec
from dino_ops.keypoints import transfer_points
from dino_ops.kmeans import kmeans
from dino_ops.linear_probe import fit_linear_probe
from dino_ops.multicrop import MultiCrop
from dino_ops.nearest_classes import classify_by_neighbours
from dino_ops.parts import fit_common_parts, fit_parts
from dino_ops.published_kmeans import FaissKMeans
from dino_ops.recipe import Recipe
from pipelines.settings import Config

# Which functions and classes of dino_ops are given the settings of a section.
USED_BY: dict[str, list[Callable[..., Any]]] = {
    "model": [Extractor],
    "image": [Extractor, ImageSpec],
    "features": [Extractor],
    "cluster": [kmeans],
    "cosegment": [fit_foreground, fit_parts, fit_common_parts, FaissKMeans],
    "correspond": [find_correspondences],
    "evaluate": [classify_by_neighbours, fit_linear_probe, transfer_points],
    "train": [Recipe, MultiCrop],
}


def shared_defaults(config: Config) -> Iterator[tuple[str, Any, str, Any]]:
    """(setting, its default, function and parameter of the same name, the parameter's default)."""
    for section, users in USED_BY.items():
        settings = getattr(config, section)
        for user in users:
            for name, parameter in inspect.signature(user).parameters.items():
                if name in type(settings).model_fields and parameter.default is not inspect.Parameter.empty:
                    where = f"{user.__name__}({name})"
                    yield f"{section}.{name}", getattr(settings, name), where, parameter.default


SHARED = list(shared_defaults(Config()))


@pytest.mark.parametrize(("setting", "default", "where", "own"), SHARED, ids=[f"{one[0]} {one[2]}" for one in SHARED])
def test_a_default_is_the_same_in_both(setting: str, default: Any, where: str, own: Any) -> None:
    assert default == own, f"{setting} is {default!r}, but {where} has {own!r}"


def test_none_of_them_is_missed() -> None:
    """A parameter that was renamed in one place alone would no longer be compared."""
    assert len(SHARED) >= 74
    settings_of_training = set(type(Config().train).model_fields)
    assert set(inspect.signature(Recipe).parameters) - {"multicrop"} <= settings_of_training
    assert set(inspect.signature(MultiCrop).parameters) <= settings_of_training
