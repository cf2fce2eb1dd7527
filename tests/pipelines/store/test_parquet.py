"""Files of tables are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables_by_hand import commit_by_hand, made_table

from pipelines.errors import JobError
from pipelines.store.parquet import described, open_parquet, write_parquet
from pipelines.store.rewriting import merge_files, rewrite

SCHEMA = pa.schema([("image_id", pa.string()), ("version", pa.int64())])


def rows(*ids: str) -> pa.Table:
    return pa.table({"image_id": list(ids), "version": [1] * len(ids)}, schema=SCHEMA)


@pytest.mark.parametrize("how", ["write", "merge", "rewrite"])
def test_a_file_that_fails_half_way_leaves_nothing(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = made_table(str(tmp_path / "images"), SCHEMA)
    files = [table.write_file(f"part-{name}.parquet", rows(name)) for name in "ab"]
    commit_by_hand(table, files, [], "r")
    before = table.present_files()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if how == "write":
            write_parquet(table.uri, "part-c.parquet", rows("c"))
        elif how == "merge":
            merge_files(table, files, "part-c.parquet")
        else:
            rewrite(table, files[0], "r2", lambda found: found)
    assert table.present_files() == before


def test_a_file_is_described_by_its_footer(tmp_path: Path) -> None:
    table = str(tmp_path / "images")
    written = write_parquet(table, "part-a.parquet", rows("a", "b"))
    assert described(table, "part-a.parquet") == written
    assert described(table, "part-b.parquet") is None, "it is gone"
    path = tmp_path / "images" / "part-a.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert described(table, "part-a.parquet") is None, "it is cut short"
    pq.write_table(rows("a"), path, write_statistics=False)
    assert described(table, "part-a.parquet") is None, "nobody can say which images it holds"


def test_a_file_that_is_gone_is_one_sentence_whoever_opens_it(tmp_path: Path) -> None:
    gone = tmp_path / "store" / "images" / "gone.parquet"
    with pytest.raises(JobError, match=rf"{gone} is gone: .*dinoray repair {tmp_path}/store`"), open_parquet(str(gone)):
        pass
    with pytest.raises(FileNotFoundError), open_parquet(str(gone)):
        pass


@pytest.mark.parametrize(
    ("column", "written"),
    [
        ("image_id", pa.array([b"a"], pa.binary())),
        ("row", pa.array([255], pa.uint8())),
        ("saliency", pa.array([1.0], pa.float64())),
        ("extracted_at", pa.array([1], pa.int64())),
        ("descriptor", pa.array([[251]], pa.list_(pa.uint8()))),
    ],
)
def test_a_footer_that_calls_columns_otherwise_is_damage(column: str, written: pa.Array, tmp_path: Path) -> None:
    """Footers have no checksum: one flipped bit makes texts bytes, or -5 251."""
    file = tmp_path / "patches" / "a.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({column: written}), file)
    with pytest.raises(JobError, match=rf"a\.parquet is damaged \(its column {column} is of "), open_parquet(str(file)):
        pass
