"""Annotations that belong to images of a store by their names: masks and part labels in a folder, and key points.

`images/cow/1.jpg` of a store and `cow/1.png` of a folder are the same image: the path of one, without its ending, ends
with that of the other.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.errors import RequestError
from pipelines.evaluate.annotations import read_annotations
from pipelines.sources.names import extension, is_image_name

SPAIR_FOLDERS = ("ImageAnnotation", "PairAnnotation")


@dataclass(frozen=True)
class KeyPoints:
    """The points of an image that are visible. names: (n,) what each is called. xy: (n, 2), pixels of the original."""

    names: list[str]
    xy: np.ndarray


class TruthFolder:
    """A folder of masks or labels, each an image file of one channel."""

    def __init__(self, uri: str, options: storage.Options) -> None:
        """Raises RequestError where there is no such folder, or no image in it."""
        self.uri = uri
        self._fs, self._root = storage.filesystem(storage.normalise(uri), options)
        self._root = self._root.rstrip("/")
        try:
            found = self._fs.find(self._root) if self._fs.isdir(self._root) else None
        except OSError as error:
            raise RequestError(f"The folder {uri} cannot be read: {error}.") from None
        if found is None:
            raise RequestError(f"There is no folder {uri}: give the one with the annotated masks.")
        self.names = sorted(path.removeprefix(f"{self._root}/") for path in found if is_image_name(path))
        if not self.names:
            raise RequestError(f"The folder {uri} holds no image files: give the one with the annotated masks.")

    def read(self, name: str) -> np.ndarray:
        """The values of a file: (H, W) integers, for a palette image its indices.

        Raises RequestError for a file that is no image, or has colours.
        """
        try:
            with Image.open(io.BytesIO(self._fs.cat_file(f"{self._root}/{name}"))) as image:
                image.load()
                one = image.convert("L") if image.mode == "1" else image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise RequestError(f"{self.uri}/{name} cannot be read as an image: {error}.") from None
        values = np.asarray(one)
        if values.ndim == 3 and (values[..., :3] == values[..., :1]).all():
            values = values[..., 0]  # grey that was saved with three channels
        if values.ndim != 2:
            raise RequestError(f"{self.uri}/{name} has colours ({image.mode}), and a mask has one value a pixel.")
        return values


def match_names(image_ids: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """The annotation of each image that has one; where several fit, the one that shares the longest path.

    Raises RequestError where two fit equally.
    """
    by_last: dict[str, list[tuple[list[str], str]]] = {}
    for name in names:
        path = _path(name)
        by_last.setdefault(path[-1], []).append((path, name))
    found = {}
    for image_id in image_ids:
        own = _path(image_id)
        fitting = []
        for path, name in by_last.get(own[-1], ()):
            shared = min(len(own), len(path))
            if own[-shared:] == path[-shared:]:
                fitting.append((shared, name))
        if not fitting:
            continue
        longest = max(shared for shared, _ in fitting)
        best = [name for shared, name in fitting if shared == longest]
        if len(best) > 1:
            raise RequestError(
                f"{image_id} could be annotated by {best[0]} or by {best[1]}: keep one, or name folders."
            )
        found[image_id] = best[0]
    return found


def read_key_points(uri: str, options: storage.Options) -> dict[str, KeyPoints] | None:
    """The key points of each image (CLASS/FILE), or None where the folder has no annotations of that kind.

    SPair-71k: ImageAnnotation/CLASS/*.json. PF-WILLOW: CLASS/*.mat, whose points are called by their number.
    """
    fs, root = storage.filesystem(storage.normalise(uri), options)
    root = root.rstrip("/")
    if not fs.isdir(root):
        raise RequestError(f"There is no folder {uri} with annotations.")
    if any(fs.isdir(f"{root}/{folder}") for folder in SPAIR_FOLDERS):
        files = sorted(name for name in fs.find(f"{root}/ImageAnnotation") if name.endswith(".json"))
        if not files:
            raise RequestError(f"{uri} looks like SPair-71k, but ImageAnnotation holds no .json with key points.")
        return dict(_spair_points(fs, name) for name in files)
    if not any(name.endswith(".mat") for name in fs.find(root, maxdepth=2)):
        return None
    pairs = read_annotations(uri, "test", options).pairs
    points = {pair.source: pair.source_xy for pair in pairs}
    return {name: KeyPoints([str(at) for at in range(len(xy))], xy) for name, xy in points.items()}


def _spair_points(fs: Any, name: str) -> tuple[str, KeyPoints]:
    try:
        content = json.loads(fs.cat_file(name))
        visible = {str(key): point for key, point in content["kps"].items() if point is not None}
        xy = np.array(list(visible.values()), np.float64).reshape(len(visible), 2)
        image = f"{name.rsplit('/', 2)[1]}/{content['filename']}"
    except KeyError as error:
        raise RequestError(f"{name} is not an annotation of an image: it lacks {error.args[0]}.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise RequestError(f"{name} is not an annotation of an image: {error}.") from None
    return image, KeyPoints(list(visible), xy)


def _path(name: str) -> list[str]:
    stem = name[: -len(extension(name))] if is_image_name(name) else name
    return [part for part in stem.split("/") if part not in ("", ".")] or [""]
