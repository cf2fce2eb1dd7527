"""Which images belong together: those of a label, of a folder, of a cluster, or those that a file lists as a set.

An image is its position in a table of images.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import RequestError, counted
from pipelines.jobs import CLUSTERING_PREFIX
from pipelines.results.clusters import ClusterTables
from pipelines.results.same_extraction import same_extraction
from pipelines.sources.id_files import IdFile, is_id_file, names_shown, read_id_file

FORMS = "label, directory, cluster:NAME, or a .csv, .jsonl or .parquet file with columns image_id and set_id"
FILE = IdFile("sets", "cosegment.sets", FORMS, {"image_id": "an image_id", "set_id": "a set_id"})
SET_ID_OF_NO_FOLDER = "."


class NoSuchSets(RequestError):
    """The store's images, as they are now, do not make the sets that were asked for."""


@dataclass(frozen=True)
class ImageSets:
    """Sets of images. Only a file can have an image in several of them.

    members: set_id -> positions of its images in the table of images, ascending. source: label, directory, cluster:NAME
    or file. whole: every possible set is among them, so that other sets are outdated.
    """

    members: dict[str, np.ndarray]
    source: str
    messages: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.source != "file"

    def __len__(self) -> int:
        return len(self.members)

    @property
    def images(self) -> int:
        """Masks to make: an image counts once for each of its sets."""
        return sum(len(members) for members in self.members.values())


def source_of(asked: str) -> str:
    """label, directory, cluster:NAME, or file. Raises RequestError for what is none of them."""
    if asked in ("label", "directory") or (asked.startswith(CLUSTERING_PREFIX) and len(asked) > len(CLUSTERING_PREFIX)):
        return asked
    if is_id_file(asked):
        return "file"
    raise RequestError(f"cosegment.sets is {asked}, but it must be {FORMS}.")


def choose_sets(asked: str, store: str, images: pa.Table, options: storage.Options) -> ImageSets:
    """The sets that cosegment.sets asks for.

    images: image_id, label, run_id, in key order.

    Raises NoSuchSets for unknown images and where there are no sets, RequestError for anything else.
    """
    source = source_of(asked)
    if source == "label":
        return sets_by_label(images["label"])
    if source == "directory":
        return sets_by_directory(images["image_id"])
    if source == "file":
        return sets_of_file(asked, images["image_id"], options)
    return sets_by_cluster(asked.removeprefix(CLUSTERING_PREFIX), store, images, options)


def sets_by_label(labels: pa.ChunkedArray) -> ImageSets:
    """A set for each label. Raises NoSuchSets where no image has one."""
    if labels.null_count == len(labels):
        raise NoSuchSets(
            f"There are no sets: of {counted(len(labels), 'image')} none has a label; give --sets directory, "
            "cluster:NAME or a file with image_id and set_id."
        )
    messages = []
    if labels.null_count:
        without = f"{counted(labels.null_count, 'image')} without a label"
        messages.append(f"{without} {'is' if labels.null_count == 1 else 'are'} in no set.")
    return ImageSets(_groups(labels), "label", messages)


def sets_by_directory(image_ids: pa.ChunkedArray) -> ImageSets:
    """A set for each folder that image_ids name; images in no folder make the set `.`."""
    folders = [posixpath.dirname(image_id) or SET_ID_OF_NO_FOLDER for image_id in image_ids.to_pylist()]
    return ImageSets(_groups(pa.chunked_array([pa.array(folders, pa.string())])), "directory")


def sets_by_cluster(name: str, store: str, images: pa.Table, options: storage.Options) -> ImageSets:
    """A set for each cluster of a clustering of images, its cluster_id as text.

    Raises NoSuchSets where there is no such clustering or it has no image, RequestError for a clustering of patches.
    """
    tables = ClusterTables.open_existing(store, name, options)
    model = tables.model() if tables else None
    if tables is None or model is None:
        there = ", ".join(ClusterTables.all_in(store, options)) or "none"
        raise NoSuchSets(
            f"The store has no clusters {name} (it has {there}): make them with `dinoray cluster {store} {name} --of "
            "embeddings`."
        )
    if model.progress.settings["of"] != "embeddings":
        raise RequestError(
            f"The clusters {name} are of patches, and sets are of images: cluster images with `dinoray cluster {store} "
            "NAME --of embeddings`."
        )
    rows = tables.assignments.read(["image_id", "cluster_id", "run_id"])
    at, same = same_extraction(images["image_id"], images["run_id"], rows)
    clusters = pc.if_else(same, rows["cluster_id"].take(at), pa.scalar(None, pa.int32())).cast(pa.string())
    if clusters.null_count == len(clusters):
        raise NoSuchSets(
            f"There are no sets: the clusters {name} hold none of the store's images as they are now; bring them up to "
            f"date with `dinoray cluster {store} {name} --update`."
        )
    messages = []
    if clusters.null_count:
        are, them = ("is", "it") if clusters.null_count == 1 else ("are", "them")
        messages.append(
            f"{counted(clusters.null_count, 'image')} not in the clusters {name}, or extracted again since, {are} in "
            f"no set: `dinoray cluster {store} {name} --update` assigns {them}."
        )
    return ImageSets(_groups(clusters), f"{CLUSTERING_PREFIX}{name}", messages)


def sets_of_file(uri: str, image_ids: pa.ChunkedArray, options: storage.Options) -> ImageSets:
    """The sets that a CSV, JSON-lines or Parquet file lists; an image may be in several.

    Raises RequestError when it cannot be read, lacks a column or a value, or lists nothing, NoSuchSets when it names
    images that are not there.
    """
    ids, set_ids = read_id_file(uri, FILE, options)
    if not len(ids):
        raise RequestError(f"The sets file {uri} lists no images.")
    if empty := pc.sum(pc.equal(set_ids, "")).as_py():
        raise RequestError(f"The sets file {uri} has {counted(empty, 'empty value')} where a set_id should be.")
    at = pc.index_in(ids, value_set=image_ids.combine_chunks())
    if at.null_count:
        unknown = sorted(pc.unique(ids.filter(pc.is_null(at))).to_pylist())
        raise NoSuchSets(f"The sets file {uri} names images that the store does not have: {names_shown(unknown)}.")
    positions = at.to_numpy().astype(np.int64)
    members = {set_id: np.unique(positions[rows]) for set_id, rows in _groups(set_ids).items()}
    found = ImageSets(members, "file")
    if repeated := len(positions) - found.images:
        were = "was" if repeated == 1 else "were"
        found.messages.append(f"{counted(repeated, 'row')} that {uri} lists again {were} skipped.")
    return found


def set_version(images: pa.Table, members: np.ndarray) -> str:
    """The same for the same images in the same extraction.

    images: image_id, run_id. members: positions, ascending.
    """
    rows = images.select(["image_id", "run_id"]).take(pa.array(members))
    content = hashlib.sha256()
    for image_id, run_id in zip(rows["image_id"].to_pylist(), rows["run_id"].to_pylist(), strict=True):
        content.update(json.dumps([image_id, run_id]).encode())
    return content.hexdigest()[:16]


def _groups(values: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Positions of each value, ascending; values in order, nulls in none."""
    encoded = values.combine_chunks().dictionary_encode()
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    groups = {name: order[starts[code] : starts[code + 1]] for code, name in enumerate(encoded.dictionary.to_pylist())}
    return dict(sorted(groups.items()))
