"""Bytes of images by the uri that a store has of them, and the picture of a search among them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hand_made import add_images
from PIL import Image
from small_runs import settings

from pipelines import sources
from pipelines.index import job as index
from pipelines.index import search
from pipelines.store.originals import stored_images
from pipelines.store.store import Store


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {f"{name}.png": png((40 * at, 255 - 40 * at, 17)) for at, name in enumerate("abcd")}


def folder(place: Path) -> Path:
    place.mkdir()
    for name, data in IMAGES.items():
        (place / name).write_bytes(data)
    return place


def tar(place: Path) -> Path:
    place.mkdir()
    with tarfile.open(place / "shard#0.tar", "w") as archive:
        for name, data in IMAGES.items():
            member = tarfile.TarInfo(f"deep/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return place


def parquet(place: Path) -> Path:
    place.mkdir()
    rows = pa.table({"id": list(IMAGES), "image": list(IMAGES.values())})
    pq.write_table(rows, place / "train.parquet", row_group_size=3)
    return place


@pytest.mark.parametrize("make", [folder, tar, parquet])
def test_what_was_listed_can_be_had_by_its_uri(make: Callable[[Path], Path], tmp_path: Path) -> None:
    listing = sources.list_images(str(make(tmp_path / "in"))).table
    uris = listing["uri"].to_pylist()
    found = stored_images([*uris[1:], uris[1], "", str(tmp_path / "gone.png"), str(tmp_path / "gone.tar/x.png")])
    names = [image_id.rsplit("/", 1)[-1] for image_id in listing["image_id"].to_pylist()]
    assert found == {uri: IMAGES[name] for uri, name in list(zip(uris, names, strict=True))[1:]}


@pytest.mark.parametrize("make", [folder, tar, parquet])
def test_the_picture_shows_images_of_every_kind_of_input(make: Callable[[Path], Path], tmp_path: Path) -> None:
    rows = sources.list_images(str(make(tmp_path / "in"))).table.to_pylist()
    store = Store.create(str(tmp_path / "store"), settings())
    add_images(store, "r1", [{**row, "position": at} for at, row in enumerate(rows)])
    index.run(settings(), store=store.uri, name="main")
    picture = tmp_path / "found.png"
    search.run(settings(), store=store.uri, name="main", image=rows[0]["image_id"], save=str(picture))
    with Image.open(picture) as drawn:
        shown = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24) or []}
    assert {(40 * at, 255 - 40 * at, 17) for at in range(4)} <= shown


def test_an_image_that_is_gone_is_left_grey(tmp_path: Path) -> None:
    rows = sources.list_images(str(folder(tmp_path / "in"))).table.to_pylist()
    store = Store.create(str(tmp_path / "store"), settings())
    add_images(store, "r1", [{**row, "position": at} for at, row in enumerate(rows)])
    index.run(settings(), store=store.uri, name="main")
    (tmp_path / "in" / "c.png").unlink()
    (tmp_path / "in" / "d.png").write_bytes(b"no image")
    search.run(settings(), store=store.uri, name="main", image="a.png", save=str(tmp_path / "found.png"))
    with Image.open(tmp_path / "found.png") as drawn:
        shown = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24) or []}
    assert (40, 215, 17) in shown and not {(80, 175, 17), (120, 135, 17)} & shown
