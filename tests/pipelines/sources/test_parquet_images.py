"""Images inside Parquet files: the bytes fetched are those written, row by row, whatever the layout of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import InputError, Listing, fetch, list_images

HF_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMN_TYPES = {
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "struct": HF_STRUCT,
    "large struct": pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]),
    "fixed": pa.binary(50),
}


def image(number: int) -> bytes:
    return bytes((number * 31 + position) % 256 for position in range(50))


def write(path: Path, columns: dict[str, Any], schema: pa.Schema | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, **options)


def ids(listing: Listing) -> list[str]:
    return listing.table["image_id"].to_pylist()


def contents(listing: Listing) -> dict[str, bytes | None]:
    return dict(zip(ids(listing), [one.data for one in fetch(listing.table)], strict=True))


@pytest.mark.parametrize("kind", COLUMN_TYPES.values(), ids=COLUMN_TYPES)
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_every_type_of_column_gives_the_bytes_written(tmp_path: Path, kind: pa.DataType, compression: str) -> None:
    in_struct = pa.types.is_struct(kind)
    values = [{"bytes": image(n), "path": None} if in_struct else image(n) for n in range(25)]
    columns = {"image": pa.array(values, kind), "label": pa.array([n % 3 for n in range(25)])}
    write(tmp_path / "a.parquet", columns, row_group_size=10, compression=compression)
    listing = list_images(str(tmp_path / "a.parquet"))
    assert listing.kind == "parquet" and listing.broken == []
    assert contents(listing) == {f"a.parquet/{n:08d}": image(n) for n in range(25)}
    assert listing.table["label"].to_pylist() == [str(n % 3) for n in range(25)]
    assert listing.table["uri"].to_pylist() == [f"{tmp_path}/a.parquet#{n}" for n in range(25)]
    status = (tmp_path / "a.parquet").stat()
    assert set(listing.table["source_version"].to_pylist()) == {str(status.st_mtime_ns)}


@pytest.mark.parametrize("id_name", ["id", "image_id", "key", "__key__"])
@pytest.mark.parametrize("label_name", ["label", "cls", "class"])
def test_ids_and_labels_come_from_columns(tmp_path: Path, id_name: str, label_name: str) -> None:
    columns = {"more": [1.5, 2.5], id_name: ["b", "a"], "image": [image(1), image(2)], label_name: ["dog", None]}
    write(tmp_path / "a.parquet", columns)
    listing = list_images(str(tmp_path / "a.parquet"))
    assert contents(listing) == {"a": image(2), "b": image(1)}
    assert listing.table["label"].to_pylist() == [None, "dog"]


def test_paths_of_the_struct_are_ids_where_they_are_unique(tmp_path: Path) -> None:
    def structs(*paths: str | None) -> pa.Array:
        return pa.array([{"bytes": image(n), "path": path} for n, path in enumerate(paths)], HF_STRUCT)

    write(tmp_path / "a.parquet", {"image": structs("x.jpg", "cat/y.jpg")})
    assert contents(list_images(str(tmp_path / "a.parquet"))) == {"x.jpg": image(0), "cat/y.jpg": image(1)}
    for paths in (("x.jpg", "x.jpg"), ("x.jpg", None)):
        write(tmp_path / "a.parquet", {"image": structs(*paths)})
        assert contents(list_images(str(tmp_path / "a.parquet"))) == {
            "a.parquet/00000000": image(0),
            "a.parquet/00000001": image(1),
        }


def test_several_files_and_row_groups_in_any_order(tmp_path: Path) -> None:
    for number, rows in enumerate((7, 1, 12)):
        images = [image(100 * number + row) for row in range(rows)]
        write(tmp_path / "in" / f"train-{number}.parquet", {"image": images}, row_group_size=3)
    expected = {
        f"train-{number}.parquet/{row:08d}": image(100 * number + row)
        for number, rows in enumerate((7, 1, 12))
        for row in range(rows)
    }
    listing = list_images(str(tmp_path / "in"))
    assert contents(listing) == expected
    assert contents(list_images(f"{tmp_path}/in/*.parquet")) == expected
    shuffled = listing.table.take([(row * 7) % 20 for row in range(20)])
    found = dict(zip(shuffled["image_id"].to_pylist(), [one.data for one in fetch(shuffled)], strict=True))
    assert found == expected


def test_rows_without_bytes_are_rows_with_an_error(tmp_path: Path) -> None:
    structs = [{"bytes": image(0), "path": "a"}, {"bytes": None, "path": "b"}, None, {"bytes": b"", "path": "d"}]
    write(tmp_path / "struct.parquet", {"image": pa.array(structs, HF_STRUCT), "id": list("abcd")})
    write(tmp_path / "plain.parquet", {"image": [image(1), None], "id": ["e", "f"]})
    fetched = fetch(list_images(str(tmp_path)).table)
    assert [one.data for one in fetched] == [image(0), None, None, b"", image(1), None]
    assert [str(one.error or "") for one in fetched if one.data is None] == ["the row has no image bytes"] * 3


def test_of_several_binary_columns_the_one_with_a_usual_name_is_meant(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"mask": [b"no"], "image": [image(1)], "thumbnail": [b"no"]})
    assert list(contents(list_images(str(tmp_path / "a.parquet"))).values()) == [image(1)]
    write(tmp_path / "a.parquet", {"left": [image(1)], "right": [image(2)]})
    with pytest.raises(InputError, match=r"several binary columns \(left, right\): name the one with images `image`"):
        list_images(str(tmp_path / "a.parquet"))


def test_a_file_without_images_is_refused_with_its_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["a.jpg"], "width": [3]})
    with pytest.raises(InputError, match=r"neither a `uri` column nor one with image bytes \(it has url, width\)"):
        list_images(str(tmp_path / "a.parquet"))


def test_a_dataset_without_rows_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(InputError, match="has no images: there is nothing in it"):
        list_images(str(tmp_path / "a.parquet"))


def test_two_rows_with_one_id_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": [image(0), image(1)], "id": ["x", "x"]})
    with pytest.raises(InputError, match=r"same id \('x'; 1 row too many\)"):
        list_images(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"no parquet at all", b"PAR1" + b"\xff" * 100 + b"PAR1", "cut"])
@pytest.mark.parametrize("name", ["0.parquet", "2.parquet"], ids=["before", "after"])
def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path: Path, damage: bytes | str, name: str) -> None:
    write(tmp_path / "1.parquet", {"image": [image(1), image(2)]})
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / name).write_bytes(whole[:-30] if isinstance(damage, str) else damage)
    listing = list_images(str(tmp_path))
    assert contents(listing) == {"1.parquet/00000000": image(1), "1.parquet/00000001": image(2)}
    (broken,) = listing.broken
    assert (broken.image_id, broken.uri) == (name, str(tmp_path / name))
    assert broken.error and broken.message and "\n" not in broken.message


def test_damaged_pages_are_errors_of_their_rows(tmp_path: Path) -> None:
    """The footer is whole, one row group is not: its images fail, those of the other are read."""
    images = [image(n) for n in range(6)]
    write(tmp_path / "a.parquet", {"image": images}, row_group_size=3, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    (tmp_path / "a.parquet").write_bytes(data)
    fetched = fetch(list_images(str(tmp_path / "a.parquet")).table, attempts=1)
    assert [one.data for one in fetched] == [None] * 3 + images[3:]
    assert all(one.error for one in fetched[:3])


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    """Row groups are remembered between calls, but not those of another version of the file."""
    path = tmp_path / "a.parquet"
    write(path, {"image": [image(1), image(2), image(3)]})
    first = list_images(str(path))
    assert list(contents(first).values()) == [image(1), image(2), image(3)]
    write(path, {"image": [image(4), image(5)]})
    assert list(contents(list_images(str(path))).values()) == [image(4), image(5)]


def test_a_file_that_lost_rows_after_it_was_listed_is_an_error_of_those_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, {"image": [image(n) for n in range(4)]}, row_group_size=2)
    table = list_images(str(path)).table
    write(path, {"image": [image(9)]}, row_group_size=2)
    fetched = fetch(table, attempts=1)
    assert [one.data for one in fetched] == [None] * 4
    assert all("changed" in str(one.error) for one in fetched)
