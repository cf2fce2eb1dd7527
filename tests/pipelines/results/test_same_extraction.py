"""What is new, changed or gone since rows of a result were made."""

from __future__ import annotations

import pyarrow as pa

from pipelines.results.same_extraction import find_changes, same_extraction


def rows(**runs: str) -> pa.Table:
    schema = pa.schema([("image_id", pa.string()), ("run_id", pa.string())])
    return pa.table({"image_id": list(runs), "run_id": list(runs.values())}, schema=schema)


def test_an_image_extracted_again_is_another_one() -> None:
    images, done = rows(a="r1", b="r2", d="r1"), rows(c="r1", b="r1", a="r1")
    at, same = same_extraction(images["image_id"], images["run_id"], done)
    assert (at.to_pylist(), same.to_pylist()) == ([2, 1, None], [True, False, False])
    fresh, gone = find_changes(images, done)
    assert fresh.to_pydict() == {"image_id": ["b", "d"], "run_id": ["r2", "r1"]}
    assert gone.to_pylist() == ["c", "b"]


def test_nothing_is_done_or_nothing_is_there() -> None:
    images = rows(a="r1")
    assert find_changes(images, rows())[0] == images and find_changes(images, rows())[1].to_pylist() == []
    assert len(find_changes(rows(), images)[0]) == 0 and find_changes(rows(), images)[1].to_pylist() == ["a"]
