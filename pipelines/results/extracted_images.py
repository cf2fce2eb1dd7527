"""Which extraction of each image a store holds, for results that were made from one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.results.same_extraction import same_extraction
from pipelines.store.schemas import IMAGES
from pipelines.store.snapshots import Snapshot

_COLUMNS = ["image_id", "run_id"]


class ExtractedImages:
    """The images of a store, snapshot after snapshot; of each only the files that are new are read."""

    def __init__(self) -> None:
        self._rows: dict[str, pa.Table] = {}

    def of(self, current: Snapshot) -> pa.Table:
        """image_id, run_id of every image."""
        table = current.table("images", IMAGES)
        files = current.files("images")
        self._rows = {path: rows for path, rows in self._rows.items() if path in files}
        for path in files.keys() - self._rows.keys():
            assert table is not None
            self._rows[path] = table.read_file(path, _COLUMNS)
        schema = pa.schema([IMAGES.field(name) for name in _COLUMNS])
        return pa.concat_tables([schema.empty_table(), *(rows.cast(schema) for rows in self._rows.values())])

    def are_current(self, current: Snapshot, rows: pa.Table, columns: Sequence[tuple[str, str]]) -> np.ndarray:
        """(n,) bool: whether the store has all images of a row in the extraction that the row says.

        columns: (image_id, run_id) columns of rows, one pair for each image that a row is made from.
        """
        found = np.ones(len(rows), bool)
        if not len(rows):
            return found
        images = self.of(current)
        for image_id, run_id in columns:
            _, same = same_extraction(rows[image_id], rows[run_id], images)
            found &= np.asarray(same, bool)
        return found
