"""What kills left in stores from before transactions, when each table was changed by a commit of its own.

A run that was killed between its commits left files of patches that no image names, images whose files of patches the
log lost, or failures of images that are done. Transactions leave nothing of the kind, and a snapshot is never between
two commits of one, so this is safe beside jobs that run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.store.changes import Change
from pipelines.store.extraction_changes import ExtractionChange, ImageRow
from pipelines.store.snapshots import Snapshot
from pipelines.store.transactions import transact
from pipelines.store.written_files import WrittenFiles

if TYPE_CHECKING:
    from pipelines.store.store import Store


def mend(store: Store, run_id: str) -> dict[str, int]:
    """Put right what such kills left, in one transaction; the images table decides what is true.

    Returns how many files of patches that no image names were removed (orphans_removed); how many that images name came
    back into the log (shards_restored) or are gone (shards_lost), so that their images are extracted again; and how
    many failures of images that are done were removed (failures_settled).

    Raises JobError for a row that names a file outside the store.
    """
    written, change, counts = WrittenFiles(), None, Counter[str]()

    def build(current: Snapshot) -> Change | None:
        nonlocal change
        put_together = ExtractionChange(store, current, written, run_id)
        counts.clear()
        counts.update(_decide(put_together))
        change = put_together.as_change()
        return change

    transact(store.log, build, run_id=run_id, command="extract")
    written.remove_unused(change)
    store.refresh()
    return {name: counts[name] for name in ("orphans_removed", "shards_restored", "shards_lost", "failures_settled")}


def _decide(change: ExtractionChange) -> dict[str, int]:
    images, patches = change.table("images"), change.table("patches")
    named = set(pc.unique(images.read(["shard"])["shard"]).to_pylist()) - {None}
    orphans = sorted(change.files("patches").keys() - named)
    change.remove("patches", orphans)
    restored = {shard: patches.described(shard) for shard in sorted(named - change.files("patches").keys())}
    change.add("patches", *restored.values())
    lost = {shard for shard, file in restored.items() if file is None}
    rows = list(_rows_naming(change, lost))
    if rows:
        change.remove_images(rows)
    failed = change.table("failures").read(["image_id"])["image_id"]
    if len(failed):
        failed = failed.filter(pc.is_in(failed, value_set=images.read(["image_id"])["image_id"]))
    return {
        "orphans_removed": len(orphans),
        "shards_restored": len(restored) - len(lost),
        "shards_lost": len(lost),
        "failures_settled": change.remove_failures(failed.to_pylist()),
    }


def _rows_naming(change: ExtractionChange, shards: set[str]) -> Iterator[ImageRow]:
    for path in change.files("images") if shards else ():
        rows = change.table("images").read_file(path, ["image_id", "shard"])
        for row in rows.filter(pc.is_in(rows["shard"], value_set=pa.array(sorted(shards), pa.string()))).to_pylist():
            yield ImageRow(row["image_id"], path, row["shard"])
