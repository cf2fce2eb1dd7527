"""What changed in a store since an index was written: images that are new, changed or gone."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.results.indices import DEAD, Manifest, read_dead, read_images, without_dead
from pipelines.results.same_extraction import find_changes
from pipelines.store.store import Store
from pipelines.store.table import Table

READS_AT_ONCE = 16


@dataclass(frozen=True)
class Changes:
    """What an index lacks and what it should no longer have.

    fresh: new and changed images, as `image_rows` gives them. gone: DEAD rows of changed and removed ones. changed: how
    many are both. version, files: of the images table in which this was found.
    """

    fresh: pa.Table
    gone: pa.Table
    changed: int
    version: int
    files: list[str]

    def __bool__(self) -> bool:
        return bool(len(self.fresh) or len(self.gone))


def everything(store: Store) -> Changes:
    """All images, as an index that does not exist yet lacks them."""
    files = sorted(store.images.files())
    return Changes(image_rows(store.images, files), DEAD.empty_table(), 0, store.images.content_version, files)


def changes_since(store: Store, name: str, before: Manifest) -> Changes:
    """What there is and is not indexed, and the other way round.

    Files of the images table never change, and an image has one row in it. So files that the index covers hold nothing
    new, and while all of them are still there nothing is gone either: then only the files that were added are read.
    """
    version, files, covered = store.images.content_version, sorted(store.images.files()), set(before.images_files)
    if covered.issubset(files):
        added = image_rows(store.images, [file for file in files if file not in covered])
        return Changes(added, DEAD.empty_table(), 0, version, files)
    images = image_rows(store.images, files)
    indexed = without_dead(read_images(store, name, before.segments), read_dead(store, name, before))
    fresh, gone = find_changes(images, indexed)
    changed = pc.sum(pc.is_in(fresh["image_id"], value_set=gone.combine_chunks())).as_py() or 0
    dead = indexed.filter(pc.is_in(indexed["image_id"], value_set=gone.combine_chunks())).select(DEAD.names)
    return Changes(fresh, dead, changed, version, files)


def image_rows(table: Table, files: Iterable[str]) -> pa.Table:
    """image_id, run_id, shard, file (of the images table that holds the row) of every image in some files."""

    def read(path: str) -> pa.Table:
        rows = table.read_file(path, ["image_id", "run_id", "shard"])
        return rows.append_column("file", pa.repeat(pa.scalar(path, pa.string()), len(rows)))

    paths = list(files)
    if len(paths) < 2:  # threads take longer to start
        found = [read(path) for path in paths]
    else:
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            found = list(pool.map(read, paths))
    schema = pa.schema([(column, pa.string()) for column in ("image_id", "run_id", "shard", "file")])
    return pa.concat_tables([schema.empty_table(), *(rows.cast(schema) for rows in found)])
