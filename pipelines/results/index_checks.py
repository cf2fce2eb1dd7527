"""Does an index hold what it says? Its files are there, its ids name its vectors, its images are those of the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DinorayError, RequestError, counted
from pipelines.results.indices import (
    CELLS,
    DEAD,
    IMAGES,
    Manifest,
    Segment,
    files_present,
    ids_of,
    index_path,
    index_uri,
    is_ours,
    manifest_file,
    read_file,
    read_manifest,
    read_replaced_manifest,
    without_dead,
)
from pipelines.results.stored import Findings
from pipelines.storage.errors import explain_read_error
from pipelines.store.damage import DamagedResult
from pipelines.store.findings import ByHand, Finding, RemoveResult
from pipelines.store.parquet import DamagedFile, why_unreadable
from pipelines.store.store import Store

SCHEMAS = {"images": IMAGES, "cells": CELLS, "dead": DEAD}


@dataclass
class _Found:
    """What is wrong with an index, and else as in Findings."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    unreferenced_files: int = 0


def check_index(store: Store, name: str, images: pa.Table) -> Findings:
    """Check one index of a store. images: image_id, run_id of every row of the images table.

    Whatever is wrong, it has to be built again, which takes no more than what the store holds.

    Raises JobError for a file that cannot be reached or may not be read.
    """
    path = index_path(name)
    try:
        found = _check(store, name, images)
    except RequestError as error:  # it is of another spec, or of a newer dinoray
        return Findings([Finding("result", path, str(error), ByHand("nothing here decides which of them is wanted"))])
    problems = [Finding("result", path, sentence, RemoveResult(path)) for sentence in found.problems]
    return Findings(problems, found.notes, found.files, found.unreferenced_files)


def _check(store: Store, name: str, images: pa.Table) -> _Found:
    findings = _Found()
    try:
        manifest = read_manifest(store, name)
    except (DamagedFile, DamagedResult) as error:
        findings.problems.append(str(error))
        return findings
    # a name is among those of indices when it has a manifest
    assert manifest is not None
    present, named = files_present(store, name), manifest.files | {manifest_file(manifest.number)}
    findings.files = len(named & present)
    findings.unreferenced_files = len(
        {file for file in present - named if is_ours(file)} - _replaced(store, name, manifest)
    )
    findings.problems += [f"{file} is in the manifest, but the file is missing" for file in sorted(named - present)]
    if findings.problems:
        return findings
    dead = DEAD.empty_table()
    if manifest.dead_file:
        dead, problem = _read(store, name, "dead", manifest.dead_file)
        findings.problems += [problem] if problem else []
    rows = []
    for segment in manifest.segments:
        loaded = {
            piece: _read(store, name, piece, file, segment.checksums.get(file)) for piece, file in segment.files.items()
        }
        unreadable = [problem for _, problem in loaded.values() if problem]
        findings.problems += unreadable
        if not unreadable:
            pieces = {piece: content for piece, (content, _) in loaded.items()}
            findings.problems += _check_segment(manifest, segment, pieces)
            rows.append(pieces["images"])
    if findings.problems:
        return findings
    stored = pa.concat_tables([IMAGES.empty_table(), *rows])
    findings.problems += _check_whole(manifest, stored, dead)
    if not findings.problems:
        _compare_with_table(store, manifest, name, without_dead(stored, dead), images, findings)
    return findings


def _replaced(store: Store, name: str, manifest: Manifest) -> set[str]:
    """Files of the manifest before this one, which are kept for searches that are reading them."""
    try:
        before = read_replaced_manifest(store, name, manifest)
    except DinorayError:
        return set()
    return before.files | {manifest_file(before.number)} if before else set()


def _read(store: Store, name: str, piece: str, file: str, expected: str | None = None) -> tuple[Any, str]:
    """A file's content, and why it cannot be read or an empty text."""
    try:
        content = read_file(store, name, file, expected)
    except (DamagedFile, FileNotFoundError, RuntimeError, pa.ArrowException) as error:
        # FAISS raises RuntimeError
        return None, f"{file} cannot be read ({why_unreadable(error)})"
    except OSError as error:
        raise explain_read_error(error, f"{index_uri(store.uri, name)}/{file}") or error from None
    if piece in SCHEMAS and not content.schema.equals(SCHEMAS[piece]):
        return None, f"{file} has other columns than an index has ({', '.join(content.schema.names)})"
    return content, ""


def _check_segment(manifest: Manifest, segment: Segment, pieces: dict[str, Any]) -> Iterator[str]:
    images, files = pieces["images"], segment.files
    if len(images) != segment.images:
        yield f"{files['images']} has {counted(len(images), 'row')}, the manifest says {segment.images:,}"
    ids = ids_of(images)
    for piece in ("vectors", "lists"):
        if piece in pieces and not pieces[piece].ntotal == segment.vectors == len(ids):
            yield (
                f"{files[piece]} has {counted(pieces[piece].ntotal, 'vector')}, the manifest says "
                f"{segment.vectors:,}, its images {len(ids):,}"
            )
    padding = 3 if segment.kind == "ivfpq" else 0
    if not 0 <= pieces["vectors"].d - manifest.dimension <= padding:
        yield f"{files['vectors']} has vectors of {pieces['vectors'].d} values, the index has {manifest.dimension}"
    if "cells" in pieces and not np.array_equal(pieces["cells"]["id"].to_numpy(), ids):
        yield f"{files['cells']} has other ids than the images of its segment"
    if (manifest.of == "patches") != ("cells" in pieces):
        yield f"{files['images']} has {'' if 'cells' in pieces else 'no '}cells with it, in an index of {manifest.of}"


def _check_whole(manifest: Manifest, stored: pa.Table, dead: pa.Table) -> Iterator[str]:
    """Problems of the images of all segments together, and of what was taken out of them."""
    first_ids = stored["first_id"].to_numpy()
    ends = first_ids + np.maximum(stored["vectors"].to_numpy(), 1)
    if np.any(ends > np.append(first_ids[1:], manifest.next_id)):
        yield "images share ids, or are not in their order"
    named = stored.filter(pc.is_in(stored["first_id"], value_set=dead["first_id"].combine_chunks()))
    if not named.select(DEAD.names).equals(dead.sort_by("first_id")):
        yield f"{manifest.dead_file} takes out images that the index does not have"
    alive = without_dead(stored, dead)
    counts = pc.value_counts(alive["image_id"])
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    yield from (f"{image_id} is in it twice" for image_id in twice.to_pylist())
    said = {"image": manifest.images, "vector": manifest.count, "removed vector": manifest.dead}
    found = {"image": len(alive), "vector": len(ids_of(alive)), "removed vector": len(ids_of(dead))}
    yield from (
        f"it has {counted(found[what], what)}, its manifest says {count:,}"
        for what, count in said.items()
        if found[what] != count
    )


def _compare_with_table(
    store: Store, manifest: Manifest, name: str, alive: pa.Table, images: pa.Table, findings: _Found
) -> None:
    lacking, extra = _missing_from(alive, images), _missing_from(images, alive)
    if manifest.images_version == store.images.content_version:
        findings.problems += [f"{image_id} is in images, but not in the index" for image_id in lacking]
        findings.problems += [
            f"{image_id} is in the index, but images does not have it like that" for image_id in extra
        ]
        return
    findings.notes.append(
        f"The index {name} is older than the store (it covers version {manifest.images_version} of the images table, "
        f"which is at {store.images.content_version}): it lacks {counted(len(lacking), 'image')}, and {len(extra):,} "
        f"in it {'is' if len(extra) == 1 else 'are'} changed or gone. `dinoray index` brings it up to date."
    )


def _missing_from(one: pa.Table, other: pa.Table) -> list[str]:
    """image_ids of rows of `other` that are not in `one` with the same run_id."""
    at = pc.index_in(other["image_id"], value_set=one["image_id"].combine_chunks())
    same = pc.fill_null(pc.equal(one["run_id"].take(at), other["run_id"]), False)
    return other["image_id"].filter(pc.invert(same)).to_pylist()
