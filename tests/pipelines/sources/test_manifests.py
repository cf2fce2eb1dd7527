"""Manifests in every format: what they name is what is fetched, and what is wrong with them is said with its place."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import InputError, Listing, fetch, list_images

Row = dict[str, Any]


def write_csv(path: Path, rows: list[Row], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path: Path, rows: list[Row]) -> None:
    write_csv(path, rows, "\t")


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[Row]) -> None:
    with path.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)


def gzipped(write: Callable[[Path, list[Row]], None]) -> Callable[[Path, list[Row]], None]:
    def write_and_compress(path: Path, rows: list[Row]) -> None:
        plain = path.with_name("plain")
        write(plain, rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return write_and_compress


FORMATS = {
    "m.csv": write_csv,
    "m.tsv": write_tsv,
    "m.jsonl": write_jsonl,
    "m.ndjson": write_jsonl,
    "m.parquet": write_parquet,
    "M.CSV": write_csv,
    "m.csv.gz": gzipped(write_csv),
    "m.tsv.gz": gzipped(write_tsv),
    "m.jsonl.gz": gzipped(write_jsonl),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five files below a folder, each with its own name as content."""
    for name in ("a.jpg", "b.jpg", "cat/c.png", "no extension", "späße 写真.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    return tmp_path / "in"


def rows_of(listing: Listing) -> dict[str, tuple[str | None, str | None]]:
    """image_id -> (label, what is fetched)."""
    fetched = [one.data and one.data.decode() for one in fetch(listing.table)]
    table = listing.table
    return dict(zip(table["image_id"].to_pylist(), zip(table["label"].to_pylist(), fetched, strict=True), strict=True))


@pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=FORMATS)
def test_every_format_gives_ids_labels_and_files(
    images: Path, name: str, write: Callable[[Path, list[Row]], None]
) -> None:
    rows = [
        {"uri": "a.jpg", "id": "first", "label": "dog", "width": 3},
        {"uri": "../in/b.jpg", "id": "second", "label": 'a, "b" and\nc', "width": 4},
        {"uri": str(images / "cat" / "c.png"), "id": "0003", "label": None, "width": 5},
        {"uri": f"file://{images}/no%20extension", "id": "2024-01-01", "label": "NA", "width": 6},
        {"uri": "späße 写真.jpg", "id": "ü/写真", "label": "007", "width": 7},
    ]
    write(images / name, rows)
    listing = list_images(str(images / name))
    assert listing.kind == "manifest" and listing.skipped == {} and listing.broken == []
    assert rows_of(listing) == {
        "first": ("dog", "a.jpg"),
        "second": ('a, "b" and\nc', "b.jpg"),
        "0003": (None, "cat/c.png"),
        "2024-01-01": ("NA", "no extension"),
        "ü/写真": ("007", "späße 写真.jpg"),
    }
    facts = {row["image_id"]: row for row in listing.table.to_pylist()}
    for image_id, path in (("first", "a.jpg"), ("second", "b.jpg"), ("0003", "cat/c.png")):
        status = (images / path).stat()
        assert facts[image_id]["uri"] == str(images / path)
        assert (facts[image_id]["source_size"], facts[image_id]["source_version"]) == (
            status.st_size,
            str(status.st_mtime_ns),
        )


@pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=FORMATS)
def test_without_an_id_column_the_uri_as_written_is_the_id(
    images: Path, name: str, write: Callable[[Path, list[Row]], None]
) -> None:
    write(images / name, [{"uri": "b.jpg"}, {"uri": "./cat/c.png"}])
    assert rows_of(list_images(str(images / name))) == {"b.jpg": (None, "b.jpg"), "./cat/c.png": (None, "cat/c.png")}


@pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=FORMATS)
def test_numbers_are_ids_and_labels_too(images: Path, name: str, write: Callable[[Path, list[Row]], None]) -> None:
    write(images / name, [{"uri": "a.jpg", "id": 10, "label": 1}, {"uri": "b.jpg", "id": 9, "label": 0}])
    assert rows_of(list_images(str(images / name))) == {"10": ("1", "a.jpg"), "9": ("0", "b.jpg")}


@pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=FORMATS)
def test_a_file_that_is_not_there_is_a_row_with_an_error(
    images: Path, name: str, write: Callable[[Path, list[Row]], None]
) -> None:
    write(images / name, [{"uri": "gone.jpg"}, {"uri": "a.jpg"}, {"uri": "cat"}, {"uri": "x" * 300}])
    listing = list_images(str(images / name))
    assert {key: data for key, (_, data) in rows_of(listing).items()} == {
        "a.jpg": "a.jpg",
        **dict.fromkeys(["gone.jpg", "cat", "x" * 300]),
    }
    errors = dict(zip(listing.table["image_id"].to_pylist(), listing.table["error"].to_pylist(), strict=True))
    assert errors["gone.jpg"] == f"{images}/gone.jpg: No such file or directory"
    assert errors["cat"] == f"{images}/cat is not a file" and errors["a.jpg"] is None


def test_a_pipe_is_an_error_and_is_not_waited_for(images: Path) -> None:
    os.mkfifo(images / "pipe.jpg")
    write_csv(images / "m.csv", [{"uri": "pipe.jpg"}, {"uri": "/dev/zero"}])
    assert rows_of(list_images(str(images / "m.csv"))) == {"pipe.jpg": (None, None), "/dev/zero": (None, None)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.csv", b"url,id\na.jpg,1\n", r"has no `uri` column \(it has url, id\)"),
        ("m.jsonl", b'{"url": "a.jpg", "id": 1}\n', r"has no `uri` column \(it has id, url\)"),
        ("m.csv", b"uri,id\na.jpg,1\n,2\n", "has no uri in row 2"),
        ("m.jsonl", b'{"uri": "a.jpg"}\n{"uri": null}\n', "has no uri in row 2"),
        ("m.jsonl", b'{"uri": "a.jpg"}\n{"id": "x"}\n', "has no uri in row 2"),
        ("m.csv", b"uri,id\na.jpg,1\nb.jpg,\n", "has no id in row 2"),
        ("m.csv", b"uri,id\na.jpg,1\nb.jpg,1\n", r"same id \('1'; 1 row too many\)"),
        ("m.csv", b"uri\na.jpg\na.jpg\n", r"same id \('a.jpg'; 1 row too many\)"),
        ("m.csv", b"uri,uri\na.jpg,b.jpg\n", "several columns named `uri`"),
        ("m.csv", b"", "cannot be read: Empty CSV file"),
        ("m.csv", b"uri,label\n", "has no images: there is nothing in it"),
        ("m.jsonl", b"", "has no `uri` column|has no images"),
        ("m.jsonl", b"\n\n", "has no `uri` column|has no images"),
        ("m.csv", b"uri,label\na.jpg\n", "cannot be read: .*Expected 2 columns, got 1"),
        ("m.csv", b"uri\ncaf\xe9.jpg\n", "cannot be read: .*UTF8"),
        ("m.jsonl", b'{"uri": "caf\xe9.jpg"}\n', "cannot be read: .*utf-8"),
        ("m.jsonl", b'{"uri": "a.jpg"}\n{"uri": "b.jpg"\n', "cannot be read: line 2 is not JSON"),
        ("m.jsonl", b'["a.jpg"]\n', "cannot be read: line 1 is not a JSON object"),
        ("m.jsonl", b'{"uri": ["a.jpg"]}\n', "cannot be read: line 1 has a list as uri"),
        ("m.csv.gz", b"uri\na.jpg\n", "cannot be read: Not a gzipped file"),
        ("m.jsonl.gz", gzip.compress(b'{"uri": "a.jpg"}\n' * 99)[:-9], "cannot be read: Compressed file ended"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_one_sentence(images: Path, name: str, content: bytes, said: str) -> None:
    (images / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        list_images(str(images / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_parquet_manifest_with_a_nested_uri_is_refused(images: Path) -> None:
    write_parquet(images / "m.parquet", [{"uri": {"path": "a.jpg"}}])
    with pytest.raises(InputError, match="column `uri` that is not text"):
        list_images(str(images / "m.parquet"))


def test_byte_order_marks_and_windows_line_ends(images: Path) -> None:
    (images / "m.csv").write_bytes(b'\xef\xbb\xbfuri,label\r\na.jpg,dog\r\n"b.jpg","two\r\nlines"\r\n')
    assert rows_of(list_images(str(images / "m.csv"))) == {
        "a.jpg": ("dog", "a.jpg"),
        "b.jpg": ("two\r\nlines", "b.jpg"),
    }
    (images / "m.jsonl").write_bytes(b'\xef\xbb\xbf{"uri": "a.jpg"}\r\n\r\n{"uri": "b.jpg", "label": "x"}')
    assert rows_of(list_images(str(images / "m.jsonl"))) == {"a.jpg": (None, "a.jpg"), "b.jpg": ("x", "b.jpg")}


def test_json_lines_may_differ_from_each_other(images: Path) -> None:
    """Ids of which some are numbers, a column that changes its type, a line longer than a megabyte."""
    rows: list[Row] = [
        {"uri": "a.jpg", "id": 1, "note": 5},
        {"uri": "b.jpg", "id": "x", "note": "y" * 2_000_000},
        {"uri": "cat/c.png", "id": "2024-01-01", "note": None, "more": [1]},
        {"uri": "nul\0.jpg", "id": 12345678901234567890},
        {"uri": "lone surrogate \ud800.jpg", "id": "\ud800"},
    ]
    write_jsonl(images / "m.jsonl", rows)
    listing = list_images(str(images / "m.jsonl"))
    assert {key: data for key, (_, data) in rows_of(listing).items()} == {
        "1": "a.jpg",
        "x": "b.jpg",
        "2024-01-01": "cat/c.png",
        "12345678901234567890": None,
        "\\ud800": None,
    }
    listing.table.validate(full=True)


def test_one_file_may_have_several_ids(images: Path) -> None:
    write_csv(images / "m.csv", [{"uri": "a.jpg", "id": "1"}, {"uri": "a.jpg", "id": "2"}])
    assert rows_of(list_images(str(images / "m.csv"))) == {"1": (None, "a.jpg"), "2": (None, "a.jpg")}


def test_hostile_ids_stay_text(images: Path) -> None:
    hostile = ["'; DROP TABLE images; --", "<script>", "../../x", "-rf", "a\nb", "%00#?", "\u202e", "é", "e\u0301"]
    for name, write in FORMATS.items():
        write(images / name, [{"uri": "a.jpg", "id": image_id} for image_id in hostile])
        listing = list_images(str(images / name))
        assert listing.table["image_id"].to_pylist() == sorted(hostile, key=lambda text: text.encode()), name


def test_a_manifest_in_a_folder_whose_name_is_not_text(tmp_path: Path) -> None:
    folder = tmp_path / "\udcff%20"
    folder.mkdir()
    (folder / "a.jpg").write_text("a")
    write_csv(folder / "m.csv", [{"uri": "a.jpg"}])
    write_parquet(folder / "m.parquet", [{"uri": "a.jpg"}])
    for name in ("m.csv", "m.parquet"):
        assert rows_of(list_images(str(folder / name))) == {"a.jpg": (None, "a")}


def test_several_parquet_files_are_one_manifest_and_a_damaged_one_is_named(images: Path) -> None:
    (images / "more").mkdir()
    (images / "more" / "d.jpg").write_text("d")
    write_parquet(images / "more" / "1.parquet", [{"uri": "d.jpg", "label": "x"}])
    write_parquet(images / "more" / "2.parquet", [{"uri": "../a.jpg", "id": "given"}])
    for damaged in ("0.parquet", "3.parquet"):
        (images / "more" / damaged).write_bytes(b"PAR1 but not really PAR1")
        listing = list_images(str(images / "more" / "*.parquet"))
        assert rows_of(listing) == {"d.jpg": ("x", "d"), "given": (None, "a.jpg")}
        assert [broken.image_id for broken in listing.broken] == [damaged]
        (images / "more" / damaged).unlink()


@pytest.mark.parametrize("count", [3, 40], ids=["few, asked one by one", "many, their folder listed"])
def test_a_manifest_on_remote_storage(count: int) -> None:
    fs = fsspec.filesystem("memory")
    root = f"/manifests{count}"
    for number in range(count):
        fs.pipe_file(f"{root}/images/{number:02d}.jpg", b"%d" % number)
    fs.pipe_file(f"{root}/lists/own.jpg", b"own")
    uris = [f"../images/{number:02d}.jpg" for number in range(count)]
    uris += ["own.jpg", f"memory:/{root}/images/00.jpg", "../images/gone.jpg", "gone.jpg"]
    fs.pipe_file(f"{root}/lists/m.csv", "\n".join(["uri", *uris]).encode())
    listing = list_images(f"memory:/{root}/lists/m.csv")
    found = {key: data for key, (_, data) in rows_of(listing).items()}
    expected: dict[str, str | None] = {f"../images/{number:02d}.jpg": str(number) for number in range(count)}
    expected |= {"own.jpg": "own", f"memory:/{root}/images/00.jpg": "0", "../images/gone.jpg": None, "gone.jpg": None}
    assert found == expected
    assert listing.table.filter(pa.compute.is_valid(listing.table["error"])).num_rows == 2


def test_an_unknown_protocol_in_a_manifest_is_one_sentence(images: Path) -> None:
    write_csv(images / "m.csv", [{"uri": "a.jpg"}, {"uri": "nosuch://bucket/a.jpg"}])
    with pytest.raises(InputError, match=r"nosuch://bucket/a\.jpg has a protocol that is not known"):
        list_images(str(images / "m.csv"))
