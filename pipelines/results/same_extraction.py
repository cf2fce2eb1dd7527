"""Rows of results beside the images that they were made from: which are of the extraction that there is now."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def same_extraction(
    image_ids: pa.ChunkedArray, run_ids: pa.ChunkedArray, rows: pa.Table
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """(position in rows of each image, null where it is not there; whether the row there has the same run_id).

    rows: image_id, run_id.
    """
    at = pc.index_in(image_ids, value_set=rows["image_id"].combine_chunks())
    return at, pc.fill_null(pc.equal(rows["run_id"].take(at), run_ids), False)


def find_changes(images: pa.Table, done: pa.Table) -> tuple[pa.Table, pa.ChunkedArray]:
    """The anti-joins, both ways, of images with what is done; another extraction counts as another image.

    images, done: image_id, run_id.

    Returns the rows of images that are not done, and the ids that are done and gone, or extracted again since.
    """
    _, same = same_extraction(images["image_id"], images["run_id"], done)
    kept = images["image_id"].filter(same).combine_chunks()
    gone = done["image_id"].filter(pc.invert(pc.is_in(done["image_id"], value_set=kept)))
    return images.filter(pc.invert(same)), gone
