"""Listing folders, globs and single files: every image once, under a name that any table can hold, and fetchable."""

from __future__ import annotations

import os
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import LISTING_SCHEMA, InputError, Listing, fetch, list_images


def put(path: Path | str, content: bytes | None = None) -> None:
    """A file whose content tells it from the others."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(os.fsencode(path) if content is None else content)


def ids(listing: Listing) -> list[str]:
    return listing.table["image_id"].to_pylist()


def labels(listing: Listing) -> dict[str, str | None]:
    return dict(zip(ids(listing), listing.table["label"].to_pylist(), strict=True))


def contents(listing: Listing) -> dict[str, bytes | None]:
    return dict(zip(ids(listing), [one.data for one in fetch(listing.table)], strict=True))


def test_a_folder_gives_every_image_with_its_facts(tmp_path: Path) -> None:
    for name in ("top.jpg", "cat/a.PNG", "cat/b.jpeg", "dog/big/c.webp"):
        put(tmp_path / name)
    for name in ("cat/notes.txt", "cat/more.txt", "dog/list.json", "README"):
        put(tmp_path / name)
    os.utime(tmp_path / "top.jpg", ns=(0, 1_234_567_890_123_456_789))

    listing = list_images(str(tmp_path))

    assert listing.kind == "directory" and listing.broken == [] and listing.table.schema == LISTING_SCHEMA
    assert labels(listing) == {"cat/a.PNG": "cat", "cat/b.jpeg": "cat", "dog/big/c.webp": "big", "top.jpg": None}
    assert listing.skipped == {".txt": 2, ".json": 1, "": 1}
    top = listing.table.to_pylist()[-1]
    assert (top["uri"], top["source_version"]) == (str(tmp_path / "top.jpg"), "1234567890123456789")
    assert top["source_size"] == len(str(tmp_path / "top.jpg"))
    assert contents(listing) == {name: os.fsencode(tmp_path / name) for name in ids(listing)}


@pytest.mark.parametrize("spelling", ["{root}", "{root}/", "{root}/../photos/.", "file://{root}"])
def test_a_folder_may_be_spelled_in_several_ways(tmp_path: Path, spelling: str) -> None:
    put(tmp_path / "photos" / "cat" / "a.jpg")
    listing = list_images(spelling.format(root=tmp_path / "photos"))
    assert ids(listing) == ["cat/a.jpg"]
    assert listing.table["uri"].to_pylist() == [str(tmp_path / "photos" / "cat" / "a.jpg")]


def test_a_relative_folder_gives_absolute_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert list_images("photos").table["uri"].to_pylist() == [str(tmp_path / "photos" / "a.jpg")]


def test_hidden_files_and_folders_are_not_listed(tmp_path: Path) -> None:
    for name in ("a.jpg", ".hidden.jpg", "._a.jpg", ".cache/b.jpg", "__MACOSX/c.jpg", "x/_delta_log/d.jpg"):
        put(tmp_path / name)
    assert ids(list_images(str(tmp_path))) == ["a.jpg"]
    assert ids(list_images(f"{tmp_path}/**/*.jpg")) == ["a.jpg"]


def test_a_hidden_folder_can_be_asked_for(tmp_path: Path) -> None:
    put(tmp_path / ".cache" / "a.jpg")
    assert ids(list_images(str(tmp_path / ".cache"))) == ["a.jpg"]


def test_rows_are_sorted_by_the_bytes_of_their_names(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "B.jpg",
        "a/b.jpg",
        "a-b.jpg",
        "é.jpg",
        "z.jpg",
        "10.jpg",
        "9.jpg",
        "\U0001f600.jpg",
        "\uffee.jpg",
    ]
    for name in names:
        put(tmp_path / "in" / name)
    assert ids(list_images(str(tmp_path / "in"))) == sorted(names, key=lambda name: name.encode())


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    put(tmp_path / "in" / "cat" / "a.jpg")
    put(tmp_path / "elsewhere" / "b.jpg", b"linked folder")
    put(tmp_path / "c.jpg", b"linked file")
    links = {"linked": "../elsewhere", "c.jpg": "../c.jpg", "cat/up": "..", "cat/cat": "../cat", "again": "cat"}
    links |= {"broken.jpg": "nowhere.jpg", "itself.jpg": "itself.jpg", "ping": "pong", "pong": "ping"}
    for link, target in links.items():
        (tmp_path / "in" / link).symlink_to(target)
    expected = {"c.jpg": b"linked file", "cat/a.jpg": os.fsencode(tmp_path / "in/cat/a.jpg")}
    assert contents(list_images(str(tmp_path / "in"))) == expected | {"linked/b.jpg": b"linked folder"}


@pytest.mark.parametrize("names", [("a", "z"), ("z", "a")], ids=["link last", "link first"])
def test_of_a_folder_and_a_link_to_it_the_folder_names_the_images(tmp_path: Path, names: tuple[str, str]) -> None:
    """Whatever order the disk lists them in: ids must not depend on it."""
    real, link = names
    for position in range(20):
        folder = tmp_path / "in" / f"{position:02d}"
        put(folder / real / "x.jpg")
        (folder / link).symlink_to(real)
    assert ids(list_images(str(tmp_path / "in"))) == [f"{position:02d}/{real}/x.jpg" for position in range(20)]


def test_files_without_extension_are_images_only_where_no_file_has_one(tmp_path: Path) -> None:
    put(tmp_path / "0a1b2c")
    put(tmp_path / "deep" / "3d4e5f")
    put(tmp_path / "notes.txt")
    assert ids(list_images(str(tmp_path))) == ["0a1b2c", "deep/3d4e5f"]
    put(tmp_path / "photo.jpg")
    listing = list_images(str(tmp_path))
    assert ids(listing) == ["photo.jpg"] and listing.skipped == {"": 2, ".txt": 1}


def test_a_store_below_the_input_is_not_listed(tmp_path: Path) -> None:
    for name in ("a.jpg", "store/images/b.jpg", "store2/c.jpg"):
        put(tmp_path / "in" / name)
    assert ids(list_images(str(tmp_path / "in"), exclude=str(tmp_path / "in" / "store"))) == ["a.jpg", "store2/c.jpg"]
    found = list_images(f"{tmp_path}/in/**/*.jpg", exclude=str(tmp_path / "in" / "store"))
    assert ids(found) == ["a.jpg", "store2/c.jpg"]


def test_a_store_is_known_under_its_linked_name_too(tmp_path: Path) -> None:
    put(tmp_path / "real" / "a.jpg")
    put(tmp_path / "real" / "store" / "b.jpg")
    (tmp_path / "link").symlink_to("real")
    assert ids(list_images(str(tmp_path / "link"), exclude=str(tmp_path / "real" / "store"))) == ["a.jpg"]


def test_what_is_no_file_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "in" / "a.jpg")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    (tmp_path / "in" / "folder.jpg").mkdir()
    monkeypatch.chdir(tmp_path / "in")  # socket addresses are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        assert ids(list_images(str(tmp_path / "in"))) == ["a.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/*.jpg", ["top.jpg"]),
        ("in/*/*.jpg", ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"]),
        ("in/**/*.jpg", ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/deep/2.jpg", "top.jpg"]),
        ("in/c?t/[0-9].jpg", ["0.jpg", "1.jpg"]),
        ("in/cat/{0,1}.jpg", ["0.jpg", "1.jpg"]),
        ("in/cat/{0..1}.jpg", ["0.jpg", "1.jpg"]),
        ("in/{cat,dog}/0.jpg", ["cat/0.jpg", "dog/0.jpg"]),
        ("in/{cat,dog}/*.jpg", ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"]),
        ("in/{cat,dog}/{0..0}.jpg", ["cat/0.jpg", "dog/0.jpg"]),
        ("in/{cat,dog/deep}", ["cat/0.jpg", "cat/0.png", "cat/1.jpg", "dog/deep/2.jpg"]),
        ("in/cat/{0*,*.jpg}", ["0.jpg", "0.png", "1.jpg"]),
    ],
)
def test_globs_and_braces(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("top.jpg", "cat/0.jpg", "cat/1.jpg", "cat/0.png", "dog/0.jpg", "dog/deep/2.jpg"):
        put(tmp_path / "in" / name)
    listing = list_images(str(tmp_path / pattern))
    if "c?t" in pattern:  # keys begin after the longest folder without a wildcard
        expected = [f"cat/{name}" for name in expected]
    assert ids(listing) == expected
    assert set(contents(listing).values()) == {os.fsencode(uri) for uri in listing.table["uri"].to_pylist()}


def test_numbers_in_braces_keep_their_zeros(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / f"{number:03d}.jpg")
    assert ids(list_images(str(tmp_path / "{008..011}.jpg"))) == ["008.jpg", "009.jpg", "010.jpg", "011.jpg"]
    with pytest.raises(InputError, match=r"012\.jpg, which does not exist"):
        list_images(str(tmp_path / "{008..012}.jpg"))


def test_globs_follow_links_as_folders_do(tmp_path: Path) -> None:
    put(tmp_path / "real" / "a.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jpg").symlink_to("../real/a.jpg")
    (tmp_path / "in" / "linked").symlink_to("../real")
    (tmp_path / "real" / "up").symlink_to("../in")
    assert ids(list_images(f"{tmp_path}/in/*.jpg")) == ["b.jpg"]
    assert ids(list_images(f"{tmp_path}/in/*/*.jpg")) == ["linked/a.jpg"]
    assert ids(list_images(f"{tmp_path}/in/**/*.jpg")) == ["b.jpg", "linked/a.jpg"]


def test_one_image_is_an_input(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "a.jpg", b"content")
    listing = list_images(str(tmp_path / "cat" / "a.jpg"))
    assert ids(listing) == ["a.jpg"] and contents(listing) == {"a.jpg": b"content"}


def test_names_with_wildcards_in_them_are_files_first(tmp_path: Path) -> None:
    put(tmp_path / "photos [2024]" / "a*b.jpg", b"star")
    put(tmp_path / "photos [2024]" / "{1,2}.jpg", b"braces")
    expected = {"a*b.jpg": b"star", "{1,2}.jpg": b"braces"}
    assert contents(list_images(str(tmp_path / "photos [2024]"))) == expected
    for name, content in expected.items():
        assert contents(list_images(str(tmp_path / "photos [2024]" / name))) == {name: content}


@pytest.mark.parametrize(
    ("make", "asked", "said"),
    [
        (lambda root: None, "nowhere", "does not exist: give a folder"),
        (lambda root: None, "s3//bucket", "does not exist"),
        (lambda root: (root / "empty").mkdir(), "empty", "has no images: there is nothing in it"),
        (lambda root: put(root / "docs" / "a.txt"), "docs", r"has no images: .*1 \.txt"),
        (lambda root: put(root / "a.txt"), "a.txt", "neither an image by name nor a"),
        (lambda root: put(root / "a.jpg"), "*.png", "has no images"),
        (lambda root: None, "nowhere/*.png", "does not exist"),
        (lambda root: put(root / "a.jpg"), "**.jpg", r"\*\*\.jpg cannot be followed"),
        (lambda root: put(root / "a.tar.gz"), "a.tar.gz", "compressed tar.*unpack it to .tar"),
        (lambda root: put(root / "a.tar.zst"), "a.tar.zst", "compressed tar.*unpack it to .tar"),
        (lambda root: put(root / "a.tgz"), "a.tgz", "compressed tar.*unpack it to .tar"),
    ],
)
def test_an_input_without_images_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], asked: str, said: str
) -> None:
    make(tmp_path)
    with pytest.raises(InputError, match=said) as error:
        list_images(str(tmp_path / asked))
    assert str(tmp_path / asked) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "http//x", "://", "s4://bucket"])
def test_an_unknown_protocol_is_one_sentence(uri: str) -> None:
    with pytest.raises(InputError, match=r"protocol that is not known|does not exist"):
        list_images(uri)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused_and_not_missed(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    put(tmp_path / "closed" / "b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(InputError, match=r"closed may not be read: give its permissions"):
            list_images(str(tmp_path))
    finally:
        (tmp_path / "closed").chmod(0o700)


HOSTILE = [
    "it's.jpg",
    'say "hi".jpg',
    "new\nline.jpg",
    "tab\tand\rreturn.jpg",
    "<script>alert(1)<.script>.jpg",
    "a..jpg",
    "a../b..jpg",
    "-rf.jpg",
    "#fragment?query=1&b%20c%.jpg",
    "%FF.jpg",
    "a\\b.jpg",
    "$(id) `id` ; & |.jpg",
    " leading and trailing .jpg",
    "x" * 251 + ".jpg",
    f"{'deep/' * 100}a.jpg",
    unicodedata.normalize("NFC", "ångström.jpg"),
    unicodedata.normalize("NFD", "ångström.jpg"),
    "\u202egpj.exe.jpg",
    "\u200b.jpg",
    "\U0001f469\u200d\U0001f680.jpg",
    "日本語/写真.jpg",
    "file:/a.jpg",
    "s3:/bucket.jpg",
    "CON.jpg",
    "{a,b}.jpg",
    "*.jpg",
    "'; DROP TABLE images; --.jpg",
    "\x01\x7f.jpg",
]


def test_hostile_names_arrive_as_they_are_and_can_be_fetched(tmp_path: Path) -> None:
    for name in HOSTILE:
        put(tmp_path / "in" / name, name.encode())
    listing = list_images(str(tmp_path / "in"))
    assert ids(listing) == sorted(HOSTILE, key=lambda name: name.encode())
    assert contents(listing) == {name: name.encode() for name in HOSTILE}
    listing.table.validate(full=True)
    pq.write_table(listing.table, tmp_path / "listing.parquet")
    assert pq.read_table(tmp_path / "listing.parquet").equals(listing.table)


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"\xff\xfe/a.jpg", b"50%\xff#?.jpg", b"a\xed\xa0\x80b.jpg"])
def test_names_that_are_not_text_arrive_as_text_and_can_be_fetched(tmp_path: Path, name: bytes) -> None:
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"in", name))
    put(path, b"bytes of it")
    for asked in (str(tmp_path / "in"), f"{tmp_path}/in/**", os.path.dirname(path), path):
        listing = list_images(asked)
        (image_id,) = ids(listing)
        assert image_id.encode().decode() == image_id
        assert "\\x" in image_id or b"/" in name, "a folder's name is not in the id when it is INPUT"
        assert [one.data for one in fetch(listing.table)] == [b"bytes of it"], asked
        listing.table.validate(full=True)
        (uri,) = listing.table["uri"].to_pylist()
        assert [one.data for one in fetch(list_images(uri).table)] == [b"bytes of it"], "a uri is an INPUT again"


def test_many_files_fit_one_table(tmp_path: Path) -> None:
    for number in range(3000):
        put(tmp_path / f"{number % 7}" / f"{number:05d}.jpg", b"%d" % number)
    listing = list_images(str(tmp_path))
    assert len(listing.table) == 3000 and isinstance(listing.table, pa.Table)
    assert {int(data or b"-1") for data in contents(listing).values()} == set(range(3000))
