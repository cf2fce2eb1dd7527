"""WebDataset shards: members are listed and fetched as Python's tarfile reads them; damage is named, not missed."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from pipelines.sources import InputError, Listing, fetch, list_images

Members = list[tuple[str, bytes]]


def content(seed: int, size: int = 3000) -> bytes:
    """Bytes that differ from file to file and never look like a tar header."""
    return bytes((seed * 31 + position * 7) % 251 + 1 for position in range(size))


def write_tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def judged(path: Path) -> dict[str, bytes]:
    """What tarfile, which reads one member after the other, finds in a tar."""
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isreg()}  # type: ignore[union-attr]


def ids(listing: Listing) -> list[str]:
    return listing.table["image_id"].to_pylist()


def contents(listing: Listing) -> dict[str, bytes | None]:
    return dict(zip(ids(listing), [one.data for one in fetch(listing.table)], strict=True))


FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_shard_gives_what_tarfile_gives(tmp_path: Path, form: int) -> None:
    members = [(f"{n % 3}/{n:06d}.jpg", content(n, 1 + n * 700)) for n in range(20)]
    write_tar(tmp_path / "a.tar", members, form)
    listing = list_images(str(tmp_path / "a.tar"))
    assert listing.kind == "tar" and listing.broken == [] and listing.skipped == {}
    assert contents(listing) == {f"a.tar/{name}": data for name, data in judged(tmp_path / "a.tar").items()}
    for row in listing.table.to_pylist():
        name = row["image_id"].removeprefix("a.tar/")
        assert row["uri"] == f"{tmp_path}/a.tar/{name}" and row["container"] == f"{tmp_path}/a.tar"
        assert row["source_size"] == len(dict(members)[name]) and row["label"] == name[0]
        assert row["source_version"] == str((tmp_path / "a.tar").stat().st_mtime_ns)


def test_labels_come_from_cls_members_else_from_folders(tmp_path: Path) -> None:
    members = [
        ("000.jpg", b"before its label"),
        ("000.cls", b"7\n"),
        ("deep/er/001.cls", b" dog "),
        ("deep/er/001.seg.png", b"two images"),
        ("deep/er/001.jpg", b"of one sample"),
        ("deep/er/002.jpg", b"no label"),
        ("003.jpg", b"no label and no folder"),
        ("./004.jpg", b"in the folder that was packed"),
        ("../005.jpg", b"above it"),
        ("./cat/006.jpg", b"in a folder of it"),
        ("deep/000.jpg", b"another folder's sample"),
        ("007.cls", "Kätzchen".encode()),
        ("007.jpg", b"umlaut"),
        ("008.cls", b"\xff\xfe"),
        ("008.jpg", b"a label that is not text"),
    ]
    write_tar(tmp_path / "a.tar", members)
    table = list_images(str(tmp_path / "a.tar")).table
    assert dict(zip(table["image_id"].to_pylist(), table["label"].to_pylist(), strict=True)) == {
        "a.tar/000.jpg": "7",
        "a.tar/deep/er/001.seg.png": "dog",
        "a.tar/deep/er/001.jpg": "dog",
        "a.tar/deep/er/002.jpg": "er",
        "a.tar/003.jpg": None,
        "a.tar/./004.jpg": None,
        "a.tar/../005.jpg": None,
        "a.tar/./cat/006.jpg": "cat",
        "a.tar/deep/000.jpg": "deep",
        "a.tar/007.jpg": "Kätzchen",
        "a.tar/008.jpg": "\ufffd\ufffd",
    }


def test_several_shards_beside_images(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / "in" / f"{number:02d}.tar", [("same.jpg", content(number)), ("x.json", b"{}")])
    (tmp_path / "in" / "cat").mkdir()
    (tmp_path / "in" / "cat" / "b.jpg").write_bytes(b"plain")
    shards = {f"{number:02d}.tar/same.jpg": content(number) for number in range(3)}
    listing = list_images(str(tmp_path / "in"))
    assert contents(listing) == shards | {"cat/b.jpg": b"plain"} and listing.skipped == {".json": 3}
    assert contents(list_images(f"{tmp_path}/in/*.tar")) == shards
    assert contents(list_images(f"{tmp_path}/in/{{00..02}}.tar")) == shards


def test_members_that_are_no_images_are_counted(tmp_path: Path) -> None:
    names = ["a.jpg", "a.json", "a.txt", "b.txt", "nothing", ".hidden.jpg", "__MACOSX/c.jpg", "._a.jpg", "d.tar.gz"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
        for name, kind in (
            ("folder.jpg", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
    listing = list_images(str(tmp_path / "a.tar"))
    assert ids(listing) == ["a.tar/a.jpg"]
    assert listing.skipped == {".json": 1, ".txt": 2, "": 1, ".gz": 1}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_hostile_member_names_stay_text_and_can_be_fetched(tmp_path: Path, form: int) -> None:
    names = [
        "../../etc/passwd.jpg",
        "/etc/shadow.jpg",
        "a\nb.jpg",
        "<script>.jpg",
        "'; DROP TABLE images; --.jpg",
        "long" * 100 + ".jpg",
        f"{'deep/' * 60}a.jpg",
        "äöü/写真 \U0001f600.jpg",
        "-rf *.jpg",
        "#?%20&.jpg",
        "a\\b.jpg",
        "://a.jpg",
    ]
    members = [(name, name.encode()) for name in names]
    write_tar(tmp_path / "a.tar", members, form)
    assert contents(list_images(str(tmp_path / "a.tar"))) == {f"a.tar/{name}": data for name, data in members}


def test_member_names_that_are_not_text_become_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        member = tarfile.TarInfo("café.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    assert contents(list_images(str(tmp_path / "a.tar"))) == {"a.tar/caf\\xe9.jpg": b"abc"}


def test_a_tar_whose_own_name_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "in" / "\udcff%20.tar"
    write_tar(path, [("cat/a.jpg", b"abc")])
    listing = list_images(str(tmp_path / "in"))
    assert contents(listing) == {"\\xff%20.tar/cat/a.jpg": b"abc"}
    listing.table.validate(full=True)


def test_an_empty_shard_is_no_damage(tmp_path: Path) -> None:
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(InputError, match="has no images: there is nothing in it"):
        list_images(str(tmp_path / "empty.tar"))
    write_tar(tmp_path / "full.tar", [("a.jpg", b"abc"), ("empty.jpg", b"")])
    listing = list_images(str(tmp_path))
    assert listing.broken == [] and contents(listing) == {"full.tar/a.jpg": b"abc", "full.tar/empty.jpg": b""}


def test_a_shard_cut_anywhere_gives_what_is_whole_and_says_that_it_is_damaged(tmp_path: Path) -> None:
    members = [("cat/0.jpg", content(0)), ("long" * 60 + ".jpg", content(1)), ("2.cls", b"x"), ("2.jpg", content(2))]
    write_tar(tmp_path / "whole.tar", members)
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = {member.name: member.offset_data + member.size for member in archive}
    last = max(ends.values())
    for length in sorted({*range(0, last + 512, 256), *(end + d for end in ends.values() for d in (-1, 0, 1))}):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:length])
        listing = list_images(str(cut))
        kept = {f"cut.tar/{name}": data for name, data in members if name.endswith(".jpg") and ends[name] <= length}
        assert contents(listing) == kept, length
        (broken,) = listing.broken
        assert (broken.uri, broken.image_id) == (str(cut), "cut.tar") and broken.source_version
        assert f"whole images found before that: {len(kept)}" in broken.message, length


def test_a_header_that_is_overwritten_in_the_middle_is_damage(tmp_path: Path) -> None:
    """tarfile ends silently there: what follows would be missed without a word."""
    write_tar(tmp_path / "a.tar", [(f"{n}.jpg", content(n)) for n in range(4)])
    with tarfile.open(tmp_path / "a.tar") as archive:
        third = archive.getmembers()[2].offset
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[third : third + 512] = b"\xaa" * 512
    (tmp_path / "a.tar").write_bytes(data)
    listing = list_images(str(tmp_path / "a.tar"))
    assert contents(listing) == {"a.tar/0.jpg": content(0), "a.tar/1.jpg": content(1)}
    assert [broken.error for broken in listing.broken] == ["DamagedTar"]
    assert f"byte {third}" in listing.broken[0].message


def test_a_member_of_negative_size_ends_the_listing(tmp_path: Path) -> None:
    """A hostile header that sends readers backwards, to read the same member for ever (CVE-2025-8194)."""
    write_tar(tmp_path / "a.tar", [("0.jpg", content(0)), ("1.jpg", content(1))], tarfile.GNU_FORMAT)
    with tarfile.open(tmp_path / "a.tar") as archive:
        second = archive.getmembers()[1].offset
    data = bytearray((tmp_path / "a.tar").read_bytes())
    header = data[second : second + 512]
    header[124:136] = b"\xff" * 10 + (0x10000 - 1024).to_bytes(2, "big")  # base-256, two's complement
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[second : second + 512] = header
    (tmp_path / "a.tar").write_bytes(data)
    listing = list_images(str(tmp_path / "a.tar"))
    assert contents(listing) == {"a.tar/0.jpg": content(0)} and len(listing.broken) == 1


def test_a_sparse_member_is_a_row_with_an_error_and_never_wrong_bytes(tmp_path: Path) -> None:
    """GNU tar stores files with holes in pieces: they cannot be read as one range."""
    write_tar(tmp_path / "a.tar", [("plain.jpg", b"abc")], tarfile.GNU_FORMAT)
    header = bytearray(tarfile.TarInfo("holes.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % 512  # what is stored
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (1024, 512)  # it lies at byte 1024
    header[483:495] = b"%011o\0" % 1536  # of so many
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(bytes(header) + b"\x11" * 512 + data)
    assert judged(tmp_path / "a.tar") == {"holes.jpg": bytes(1024) + b"\x11" * 512, "plain.jpg": b"abc"}
    listing = list_images(str(tmp_path / "a.tar"))
    assert ids(listing) == ["a.tar/holes.jpg", "a.tar/plain.jpg"] and listing.broken == []
    holes, plain = fetch(listing.table)
    assert holes.data is None and "sparse" in str(holes.error) and plain.data == b"abc"


@pytest.mark.parametrize("data", [b"", b"this is not a tar", b"\x89PNG\r\n\x1a\n" * 1000, gzip.compress(b"x" * 5000)])
def test_a_file_that_is_no_tar_is_damage_and_its_neighbours_are_read(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.tar").write_bytes(data)
    write_tar(tmp_path / "good.tar", [("a.jpg", b"abc")])
    listing = list_images(str(tmp_path))
    assert contents(listing) == {"good.tar/a.jpg": b"abc"}
    assert [broken.image_id for broken in listing.broken] == ["bad.tar"]
    assert len(list_images(str(tmp_path / "bad.tar")).broken) == 1


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst", "TAR.GZ"])
def test_compressed_tars_are_refused_by_name(tmp_path: Path, ending: str) -> None:
    with tarfile.open(tmp_path / f"a.{ending}", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(InputError, match=r"is a compressed tar, .*: unpack it to \.tar"):
        list_images(str(tmp_path / f"a.{ending}"))


def test_two_members_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", b"old"), ("y.jpg", b"other"), ("x.jpg", b"new")])
    with pytest.raises(InputError, match=r"same id \('a.tar/x.jpg'; 1 row too many\)"):
        list_images(str(tmp_path / "a.tar"))


def test_data_after_the_end_of_the_archive_is_not_read(tmp_path: Path) -> None:
    """As tar itself does; concatenated tars need to be joined with `tar --concatenate`."""
    write_tar(tmp_path / "a.tar", [("a.jpg", b"abc")])
    write_tar(tmp_path / "b.tar", [("b.jpg", b"def")])
    (tmp_path / "ab.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    listing = list_images(str(tmp_path / "ab.tar"))
    assert contents(listing) == {f"ab.tar/{name}": data for name, data in judged(tmp_path / "ab.tar").items()}
