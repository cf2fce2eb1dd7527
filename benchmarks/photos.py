"""Photographs to measure with: 120 full-size ones where there is test data, else those that packages carry."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import skimage.data

TEST_DATA = Path(os.environ.get("DINORAY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def photo_folder(target: Path, count: int) -> Path:
    """A folder with `count` photographs, repeated under new names as often as needed."""
    sources = _sources()
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for index in range(count):
        source = sources[index % len(sources)]
        shutil.copyfile(source, target / f"{index:05d}{source.suffix}")
    return target


def describe_sources() -> str:
    return f"{len(_sources())} photographs of {_sources()[0].parent.name}"


def _sources() -> list[Path]:
    found = sorted(path for path in (TEST_DATA / "photos").rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if found:
        return found
    package = Path(skimage.data.__file__).parent
    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    return [package / name for name in names]
