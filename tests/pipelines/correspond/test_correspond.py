"""correspond: pairs against brute force, matches against find_correspondences on the extractor's own features, and
what is left after kills, changes and races."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from documents import python_of_section
from extraction_here import extraction_here
from hand_made import DIMENSIONS, GRID, add_images, features, source
from PIL import Image
from s3_server import BUCKET, S3Server
from small_runs import photo, settings
from tables_by_hand import commit_by_hand
from typer.testing import CliRunner

from dino_ops import Extractor, find_correspondences
from pipelines.cli import app
from pipelines.correspond import job as correspond
from pipelines.correspond.pairs import Pairs, choose_pairs, nearest_pairs, scores
from pipelines.correspond.tiles import cut_blocks, make_tiles
from pipelines.correspond.worker import MatchSetup, PairRow, load_images, match_pairs
from pipelines.errors import RequestError
from pipelines.extract import job as extract
from pipelines.extract.shards import ShardWriter
from pipelines.results.made_with import MadeWith
from pipelines.results.matches import MatchReport, MatchTables
from pipelines.store.changes import Transaction
from pipelines.store.extraction import Committer, ShardReport, drop_images
from pipelines.store.patches import ImagePlace
from pipelines.store.store import Store
from pipelines.store.transaction_log import TransactionLog
from pipelines.upkeep import stats, verify

IMAGES = 8
OVERRIDES = ("features.stride=8", "store.dtype=float32", "features.extra=[{layer: 9, facet: key}]")
DINORAY = str(Path(sys.executable).with_name("dinoray"))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory, ray: None) -> tuple[Path, Path]:
    """Photos of two labels, and their store."""
    folder = tmp_path_factory.mktemp("correspond")
    for index in range(IMAGES):
        target = folder / "in" / ("cat" if index % 2 else "dog") / f"{index}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        photo(index, *((96, 72) if index % 3 else (72, 96))).save(target)
    config = settings(*OVERRIDES, "run.images_per_shard=5")
    with extraction_here():
        extract.run(config, input=str(folder / "in"), store=str(folder / "store"))
    return folder / "in", folder / "store"


def hand_made_store(folder: Path, ids: str) -> Store:
    """A store with an image for each letter, all of one label and each with descriptors of its own."""
    store = Store.create(str(folder / "store"), settings())
    add(store, "r1", ids)
    return store


def add(
    store: Store, run_id: str, ids: str, version: str = "v1", grid: tuple[int, int] = GRID, dimensions: int = DIMENSIONS
) -> None:
    """Commit one shard; images of another version replace those that are there."""
    writer = ShardWriter(store.uri, store.config, run_id)
    for at, image_id in enumerate(ids):
        noise = np.random.default_rng([ord(image_id), int(version[1])]).standard_normal((*grid, dimensions))
        writer.add({**source(image_id, at, version), "label": "one"}, replace(features(grid=grid), descriptor=noise))
    patches, images = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    changed = set(ids) if version != "v1" else set()
    Committer(store, run_id, changed).commit([report], dict.fromkeys(ids, (10, version)))
    store.refresh()


def by_hand(store: Store, name: str, pairs: list[str], *overrides: str) -> tuple[MatchTables, MatchReport]:
    """Files of pairs such as "ab", written as a worker does and not committed."""
    tables = MatchTables.open_or_make(store.uri, name, {})
    made_with = MadeWith.of("correspond", store.uri, name, settings().correspond, correspond.how_to_match, {})
    made_with.check(record=True)
    config = store.config.model_copy(update={"correspond": settings(*overrides).correspond})
    setup = MatchSetup(store.uri, tables.uri, "r9", config, "cpu")
    images = store.images.read(["image_id", "shard", "grid_height", "grid_width", "run_id"]).to_pylist()
    runs = {row["image_id"]: row["run_id"] for row in images}
    loaded = load_images(
        setup, [ImagePlace(row["image_id"], row["shard"], (row["grid_height"], row["grid_width"])) for row in images]
    )
    rows = [PairRow(a, b, 0.5, "file", runs[a], runs[b]) for a, b in pairs]
    return tables, match_pairs(setup, rows, loaded)


def rows_of(store: Path | str, name: str, table: str) -> list[dict[str, object]]:
    return DeltaTable(f"{store}/matches/{name}/{table}").to_pyarrow_table().to_pylist()


def pairs_of(store: Path | str, name: str) -> list[str]:
    """Pairs such as "ab", after checking that pairs and matches agree."""
    counted = {(row["image_a"], row["image_b"]): 0 for row in rows_of(store, name, "pairs")}
    for row in rows_of(store, name, "matches"):
        counted[row["image_a"], row["image_b"]] += 1  # a KeyError is a match without its pair
    pairs = rows_of(store, name, "pairs")
    assert {(row["image_a"], row["image_b"]): row["kept"] for row in pairs} == counted
    assert len({frozenset(pair) for pair in counted}) == len(pairs), "a pair is there twice"
    return sorted(f"{row['image_a']}{row['image_b']}" for row in pairs)


def run(store: Path | str, name: str, pairs: str, *overrides: str, **arguments: bool) -> correspond.Result:
    return correspond.run(settings(*overrides), store=str(store), name=name, pairs=pairs, **arguments)


def images_table(labels: list[str | None], embeddings: np.ndarray | None = None) -> pa.Table:
    vectors = [None] * len(labels) if embeddings is None else embeddings.tolist()
    ids = [f"{at:03d}" for at in range(len(labels))]
    types = {"image_id": pa.string(), "label": pa.string(), "embedding": pa.list_(pa.float32())}
    values = {"image_id": ids, "label": labels, "embedding": vectors}
    return pa.table({name: pa.array(values[name], kind) for name, kind in types.items()})


def as_set(pairs: Pairs) -> set[tuple[int, int]]:
    found = list(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))
    assert len(set(found)) == len(found)
    return set(found)


# pairs


def test_all_pairs_within_labels() -> None:
    labels = [[None, "b", "a", "c"][at] for at in np.random.default_rng(0).integers(0, 4, 40)] + ["alone"]
    chosen = choose_pairs("all", images_table(labels), {})
    expected = {(a, b) for a, b in combinations(range(41), 2) if labels[a] is not None and labels[a] == labels[b]}
    assert as_set(chosen) == expected
    assert chosen.messages == [f"{labels.count(None)} images without a label are in no pair."]


@pytest.mark.parametrize(("count", "k"), [(50, 3), (50, 1), (5, 10), (2, 1)])
def test_nearest_pairs(count: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.correspond.pairs.SIMILARITIES_HELD_AT_ONCE", 3 * count)  # several blocks
    vectors = (
        np.random.default_rng(1).standard_normal((count, 16)).astype(np.float32) * np.arange(1, count + 1)[:, None]
    )
    wide = vectors.astype(np.float64)
    similarity = wide @ wide.T / np.outer(*[np.linalg.norm(wide, axis=1)] * 2)
    expected = set()
    for one in range(count):
        others = sorted((other for other in range(count) if other != one), key=lambda other: -similarity[one, other])
        expected |= {(min(one, other), max(one, other)) for other in others[:k]}
    found = choose_pairs(f"knn:{k}", images_table(["x"] * count, vectors), {})
    assert as_set(found) == expected
    np.testing.assert_allclose(scores(found, vectors), similarity[found.a, found.b], atol=1e-6)
    assert not len(nearest_pairs(vectors[:1], k))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_pairs_of_a_file(tmp_path: Path, kind: str) -> None:
    """As they are listed; the same two again, in either order, and an image with itself are passed over."""
    listed = [("004", "001"), ("000", "002"), ("001", "004"), ("003", "003"), ("000", "002"), ("001", "002")]
    file = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        file.write_text("image_b,note,image_a\n" + "".join(f"{b},x,{a}\n" for a, b in listed))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"image_a": a, "image_b": b}) + "\n" for a, b in listed))
    else:
        pq.write_table(pa.table({"image_a": [a for a, _ in listed], "image_b": [b for _, b in listed]}), file)
    chosen = choose_pairs(str(file), images_table(["x"] * 5), {})
    assert list(zip(chosen.a, chosen.b, strict=True)) == [(4, 1), (0, 2), (1, 2)]
    assert len(chosen.messages) == 2 and "1 pair of an image with itself" in chosen.messages[0]


HOSTILE = ['a "quoted" one.jpg', "two\nlines.jpg", "a,b;c.jpg", "Größe/猫\u200d.jpg", "'; DROP TABLE pairs --", " x "]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_ids_may_be_any_text(tmp_path: Path, kind: str) -> None:
    """And other columns may hold anything, also what looks like numbers only at first."""
    listed = list(combinations(HOSTILE, 2))
    notes = ["1"] * (len(listed) - 1) + ["none"]
    file = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        with file.open("w", newline="", encoding="utf-8-sig") as sink:  # as spreadsheets write it
            csv.writer(sink).writerows(
                [("note", "image_a", "image_b"), *((n, *p) for n, p in zip(notes, listed, strict=True))]
            )
    elif kind == "jsonl":
        file.write_text("\n\n".join(json.dumps({"image_a": a, "image_b": b, "n": [1]}) for a, b in listed))
    else:
        pq.write_table(
            pa.table({"note": notes, "image_a": [a for a, _ in listed], "image_b": [b for _, b in listed]}), file
        )
    images = images_table(["x"] * len(HOSTILE)).set_column(0, "image_id", pa.array(sorted(HOSTILE), pa.string()))
    chosen = choose_pairs(str(file), images, {})
    ids = images["image_id"].to_pylist()
    assert [(ids[a], ids[b]) for a, b in zip(chosen.a, chosen.b, strict=True)] == listed
    assert chosen.messages == []


def test_labels_with_too_many_pairs_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str | None] = ["cat"] * 300_000 + ["dog", "dog", None]
    with pytest.raises(RequestError, match=r"makes 44,999,850,001 pairs \('cat' alone labels 300,000 images\)"):
        choose_pairs("all", images_table(labels), {})
    monkeypatch.setattr("pipelines.correspond.pairs.MOST_PAIRS_OF_ALL", 4)
    assert len(choose_pairs("all", images_table(["a", "a", "a", "b", "b", "c"]), {})) == 4


def test_a_broken_embedding_is_nobodys_neighbour() -> None:
    vectors = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
    vectors[:, 0] += 9  # all of them similar, and to zeros not
    vectors[4, 2] = np.nan
    near_broken = [pair for pair in as_set(nearest_pairs(vectors, 3)) if 4 in pair]
    assert len(near_broken) == 3, "its own three, and nobody else's"


# tiles


@pytest.mark.parametrize("band_blocks", [1, 3, 100])
def test_tiles_hold_every_pair_once_and_blocks_are_bounded(band_blocks: int) -> None:
    generator = np.random.default_rng(2)
    shards = [f"s{at // 7}" for at in range(40)]
    sizes = generator.integers(1, 10, 40)
    blocks = cut_blocks(shards, sizes, most_cells=30, most_images=6)
    assert blocks.tolist() == sorted(blocks)
    for block in range(blocks.max() + 1):
        assert sizes[blocks == block].sum() <= 30 and (blocks == block).sum() <= 6
    a, b = np.array(list(combinations(range(40), 2)))[generator.permutation(780)[:300]].T
    tiles = make_tiles(Pairs(a, b, "file"), blocks, band_blocks)
    assert sorted(np.concatenate([tile.pairs for tile in tiles])) == list(range(300))
    assert len({(tile.band, tile.block) for tile in tiles}) == len(tiles)
    assert [tile.band for tile in tiles] == sorted(tile.band for tile in tiles)
    for tile in tiles:
        for at in tile.pairs:
            low, high = sorted((blocks[a[at]], blocks[b[at]]))
            assert low // band_blocks == tile.band
            assert tile.block == (None if high // band_blocks == tile.band else high)
    assert make_tiles(Pairs(a[:0], b[:0], "file"), blocks, band_blocks) == []


def test_blocks_end_with_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group that two blocks share would be read for each."""
    monkeypatch.setattr("pipelines.correspond.tiles.IMAGES_PER_ROW_GROUP", 4)
    shards = ["s0"] * 10 + ["s1"] * 6  # row groups of 4, 4, 2 and 4, 2 images
    cells = np.ones(16, np.int64)
    assert cut_blocks(shards, cells, most_cells=7, most_images=None).tolist() == [0] * 4 + [1] * 6 + [2] * 6
    assert cut_blocks(shards, cells, most_cells=math.inf, most_images=None).tolist() == [0] * 16
    assert cut_blocks(shards, cells, most_cells=3, most_images=None).tolist() == (
        [0] * 3 + [1] + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3
    )


# the job


OTHER_SETTINGS = (
    "correspond.keep=all",
    "correspond.binned=false",
    "correspond.foreground=strict",
    "correspond.descriptor=descriptor_key9",
    "correspond.tile_images=3",
)


@pytest.mark.parametrize("overrides", [(), OTHER_SETTINGS])
def test_matches_are_those_of_the_extractors_features(extracted: tuple[Path, Path], overrides: tuple[str, ...]) -> None:
    source_folder, store = extracted
    name = f"direct{len(overrides)}"
    result = run(store, name, "all", *overrides)
    expected_pairs = [pair for label in ("cat", "dog") for pair in combinations(_ids(source_folder, label), 2)]
    assert (result.pairs, result.matched, result.already_done, result.exit_code) == (len(expected_pairs), 12, 0, 0)
    extractor = Extractor("vit_tiny_patch16_224", "random", stride=8, shorter_side=64, extra=[(9, "key")], device="cpu")
    of_image = {
        image_id: extractor(source_folder / image_id)
        for label in ("cat", "dog")
        for image_id in _ids(source_folder, label)
    }
    of_pair: dict[tuple[object, object], list[dict[str, object]]] = {pair: [] for pair in expected_pairs}
    for row in rows_of(store, name, "matches"):
        of_pair[row["image_a"], row["image_b"]].append(row)
    counts = {(row["image_a"], row["image_b"]): row for row in rows_of(store, name, "pairs")}
    assert counts.keys() == of_pair.keys()
    for (id_a, id_b), rows in of_pair.items():
        a, b = of_image[str(id_a)], of_image[str(id_b)]
        maps = (a.extra["key9"], b.extra["key9"]) if overrides else (a.descriptor, b.descriptor)
        options = {"binned": False, "foreground": "strict"} if overrides else {}
        found = find_correspondences(*maps, a.saliency, b.saliency, **options)
        ranks = {int(at): rank for rank, at in enumerate(found.selected)}
        kept = range(len(found)) if overrides else ranks
        rows = sorted(rows, key=lambda row: (row["row_a"], row["col_a"]))
        assert len(rows) == len(kept) == counts[id_a, id_b]["kept"]
        assert counts[id_a, id_b]["mutual"] == found.mutual >= len(found)
        for row, at in zip(rows, sorted(kept), strict=True):
            cell_a, cell_b = (divmod(int(c[at]), f.y.shape[1]) for c, f in ((found.cell_a, a), (found.cell_b, b)))
            assert (row["row_a"], row["col_a"], row["row_b"], row["col_b"]) == (*cell_a, *cell_b)
            assert (row["y_a"], row["x_a"]) == (a.y[cell_a], a.x[cell_a])
            assert (row["y_b"], row["x_b"]) == (b.y[cell_b], b.x[cell_b])
            assert row["rank"] == ranks.get(at, -1)
            assert row["similarity"] == pytest.approx(found.similarity[at], abs=1e-4)
            assert row["saliency"] == pytest.approx((a.saliency[cell_a] + b.saliency[cell_b]) / 2, abs=1e-4)


def test_coordinates_are_those_of_the_upright_original(tmp_path: Path) -> None:
    """The same picture once as it is, once stored on its side with an EXIF orientation, once of twice the size."""
    upright, exif = photo(3, 96, 72), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise before it is shown
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    upright.resize((192, 144), Image.Resampling.BICUBIC).save(tmp_path / "c.png")
    store = Store.create(str(tmp_path / "store"), settings("store.dtype=float32"))
    extractor = Extractor("vit_tiny_patch16_224", "random", shorter_side=64, device="cpu")
    writer = ShardWriter(store.uri, store.config, "r1")
    for at, image_id in enumerate("abc"):
        writer.add(source(image_id, at), extractor(tmp_path / f"{image_id}.png"))
    patches, images = writer.close()
    shard = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    Committer(store, "r1", set()).commit([shard], dict.fromkeys("abc", (10, "v1")))
    store.refresh()
    tables, report = by_hand(store, "m", ["ab", "ac"], "correspond.keep=all", "correspond.saliency_threshold=0")
    tables.commit([report], "r9")
    rows = rows_of(store.uri, "m", "matches")
    for row in rows:
        scale = 2 if row["image_b"] == "c" else 1
        for side, factor in (("a", 1), ("b", scale)):  # 72 pixels became 64, 96 became 85
            assert row[f"y_{side}"] == pytest.approx((row[f"row_{side}"] * 16 + 8) * factor * 72 / 64)
            assert row[f"x_{side}"] == pytest.approx((row[f"col_{side}"] * 16 + 8) * factor * 96 / 85)
    itself = [row for row in rows if (row["row_a"], row["col_a"]) == (row["row_b"], row["col_b"])]
    assert len([row for row in itself if row["image_b"] == "b"]) >= 18, "of 20 patches, but for those below 0"


def _ids(folder: Path, label: str) -> list[str]:
    return sorted(f"{label}/{path.name}" for path in (folder / label).iterdir())


def test_reads_grow_with_images_and_a_second_run_adds_what_is_new(extracted: tuple[Path, Path]) -> None:
    _, store = extracted
    first = run(store, "grows", "knn:2")
    every = run(store, "grows", f"knn:{IMAGES - 1}")
    assert (every.pairs, every.already_done) == (28, first.pairs)
    assert every.matched == 28 - first.pairs and every.bytes_read <= 1.02 * first.bytes_read
    stored = sum(column.total_compressed_size for column in _descriptor_chunks(store))
    assert every.bytes_read <= 2 * stored, "of two descriptor columns one was read, each image once"
    report = json.loads((store / "runs" / f"{every.run_id}.json").read_text())
    assert (report["command"], report["status"], report["result"]["matched"]) == ("correspond", "done", every.matched)
    assert {"plan", "read", "match", "write", "commit", "total"} <= report["result"]["seconds"].keys()


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    ("band_share", "times", "readings"), [(0.5, 1, 5), pytest.param(1e-9, 3, 15, marks=pytest.mark.slow)]
)
def test_what_is_read_for_pairs_all_over_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, band_share: float, times: int, readings: int
) -> None:
    """Every block has pairs with every other: read once where they fit into memory, else (blocks + 1) / 2 times."""
    monkeypatch.setattr("pipelines.correspond.tiles.BAND_SHARE_OF_OBJECT_STORE", band_share)
    monkeypatch.setattr("pipelines.extract.shards.IMAGES_PER_ROW_GROUP", 3)
    monkeypatch.setattr("pipelines.correspond.tiles.IMAGES_PER_ROW_GROUP", 3)
    store = Store.create(str(tmp_path / "store"), settings())
    add(store, "r1", "abcdefghijklmno", grid=(16, 24), dimensions=96)
    pairs = ["ab", "de", "gh", "jk", "mn", *("".join(pair) for pair in combinations("adgjm", 2))]
    (tmp_path / "pairs.csv").write_text("image_a,image_b\n" + "".join(f"{a},{b}\n" for a, b in pairs))
    result = run(store.uri, "m", str(tmp_path / "pairs.csv"), "correspond.tile_images=3")
    assert pairs_of(store.uri, "m") == sorted(pairs)
    (file,) = DeltaTable(f"{store.uri}/patches").file_uris()
    footer = pq.ParquetFile(file).metadata
    assert footer.num_row_groups == 5
    groups = [footer.row_group(at) for at in range(5)]
    held = sum(group.column(at).total_compressed_size for group in groups for at in range(group.num_columns))
    assert result.bytes_read == pytest.approx(
        times * held + readings * 2**16, rel=0.02
    )  # Arrow looks for footers there


def _descriptor_chunks(store: Path) -> list[pq.ColumnChunkMetaData]:
    found = []
    for file in DeltaTable(store / "patches").file_uris():
        footer = pq.ParquetFile(file).metadata
        groups = [footer.row_group(at) for at in range(footer.num_row_groups)]
        columns = [group.column(at) for group in groups for at in range(group.num_columns)]
        found += [column for column in columns if column.path_in_schema.startswith("descriptor.")]
    return found


def test_nothing_to_do_starts_neither_ray_nor_torch(extracted: tuple[Path, Path]) -> None:
    _, store = extracted
    run(store, "again", "knn:1")
    program = f"""
import sys
from pipelines.cli import app
app({["correspond", str(store), "again", "--pairs", "knn:1", "--json"]!r}, standalone_mode=False)
assert not {{"ray", "torch", "sklearn"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert (content["status"], content["pending"], content["matched"]) == ("done", 0, 0)


@pytest.mark.usefixtures("ray")
def test_pairs_without_matches_are_rows(tmp_path: Path) -> None:
    store = hand_made_store(tmp_path, "abc")
    result = run(store.uri, "none", "all", "correspond.saliency_threshold=1")
    assert (result.matched, result.matches, result.without_matches, result.exit_code) == (3, 0, 3, 0)
    for row in rows_of(store.uri, "none", "pairs"):
        assert (row["kept"], row["shard"]) == (0, None) and row["mutual"] >= 1
    assert rows_of(store.uri, "none", "matches") == []
    assert run(store.uri, "none", "all", "correspond.saliency_threshold=1").already_done == 3


@pytest.mark.usefixtures("ray")
def test_what_a_kill_between_the_commits_left_is_mended(tmp_path: Path) -> None:
    store = hand_made_store(tmp_path, "abcd")
    tables, half = by_hand(store, "m", ["ba", "ac"])
    tables.commit([half], "r9")
    _, orphan = by_hand(store, "m", ["ad", "bc"])
    assert orphan.matches
    commit_by_hand(tables.matches, [orphan.matches], [], "r9")
    found = verify.run(settings(), store=store.uri).problems
    assert len(found) == len([rows for rows in orphan.kept.values() if rows])
    assert all(problem.endswith("have matches, but are not a pair") for problem in found)
    result = run(store.uri, "m", "all")
    assert (result.pairs, result.already_done, result.matched) == (6, 2, 4)
    assert result.repaired == {"orphans_removed": 1}
    assert pairs_of(store.uri, "m") == ["ac", "ad", "ba", "bc", "bd", "cd"]
    assert verify.run(settings(), store=store.uri).problems == []


def test_lost_matches_come_back_or_are_done_again(tmp_path: Path) -> None:
    store = hand_made_store(tmp_path, "abc")
    tables, report = by_hand(store, "m", ["ab", "ac"])
    tables.commit([report], "r9")
    assert report.matches
    commit_by_hand(tables.matches, [], [report.matches.path], "r10")
    assert tables.repair("r11")["shards_restored"] == 1
    assert pairs_of(store.uri, "m") == ["ab", "ac"]
    commit_by_hand(tables.matches, [], [report.matches.path], "r12")
    (tmp_path / "store" / "matches" / "m" / "matches" / report.matches.path).unlink()
    assert tables.repair("r13")["pairs_lost"] == 2
    assert pairs_of(store.uri, "m") == []


def test_two_runs_do_every_pair_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run's transaction takes the number that this one was about to take."""
    store = hand_made_store(tmp_path, "abcd")
    ours, report = by_hand(store, "m", ["ab", "ac", "ad"])
    theirs, other = by_hand(store, "m", ["ca", "da", "cd"])
    original: Callable[..., bool] = TransactionLog.put

    def put(log: TransactionLog, transaction: Transaction) -> bool:
        if log is ours.log and not theirs.pairs.files():
            theirs.commit([other], "r10")
        return original(log, transaction)

    monkeypatch.setattr(TransactionLog, "put", put)
    (left,) = ours.commit([report], "r9")
    assert list(left.kept) == [("a", "b")]
    assert pairs_of(store.uri, "m") == ["ab", "ca", "cd", "da"]


@pytest.mark.usefixtures("ray")
def test_pairs_of_changed_images_are_matched_again_and_of_lost_ones_removed(tmp_path: Path) -> None:
    store = hand_made_store(tmp_path, "abcd")
    run(store.uri, "m", "all")
    add(store, "r2", "b", "v2")
    drop_images(store, ["d"], "r3")
    planned = run(store.uri, "m", "all", dry_run=True)
    assert (planned.pending, planned.already_done, planned.outdated) == (2, 1, 5)
    assert len(pairs_of(store.uri, "m")) == 6, "a dry run changes nothing"
    result = run(store.uri, "m", "all")
    assert (result.matched, result.already_done, result.outdated) == (2, 1, 5)
    assert pairs_of(store.uri, "m") == ["ab", "ac", "bc"]
    runs = {
        (row["image_a"], row["image_b"]): (row["run_id_a"], row["run_id_b"]) for row in rows_of(store.uri, "m", "pairs")
    }
    assert runs == {("a", "b"): ("r1", "r2"), ("a", "c"): ("r1", "r1"), ("b", "c"): ("r2", "r1")}


def test_a_killed_driver_loses_and_repeats_nothing(extracted: tuple[Path, Path]) -> None:
    _, store = extracted
    options = [
        part
        for one in ("run.workers=1", "run.commit_seconds=0.01", "correspond.tile_images=1")
        for part in ("--set", one)
    ]
    command = [DINORAY, "correspond", str(store), "killed", "--pairs", f"knn:{IMAGES - 1}", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    log = store / "matches" / "killed" / "pairs" / "_delta_log"
    deadline = time.monotonic() + 120
    while not log.is_dir() or len(list(log.glob("*.json"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(rows_of(store, "killed", "pairs"))
    assert 0 < done < 28
    result = run(store, "killed", f"knn:{IMAGES - 1}")
    assert (result.already_done, result.matched) == (done, 28 - done)
    assert len(pairs_of(store, "killed")) == 28
    whole = run(store, "whole", f"knn:{IMAGES - 1}")
    assert whole.matched == 28
    assert _points(store, "killed") == _points(store, "whole")


@pytest.mark.slow
def test_kills_at_several_moments_and_of_workers_lose_and_repeat_nothing(extracted: tuple[Path, Path]) -> None:
    """kill -9: before there is anything, between the commits of both tables, after some, and a worker at its work."""
    _, store = extracted
    options = ("run.workers=1", "run.commit_seconds=0.01", "correspond.tile_images=1")
    given = [part for one in options for part in ("--set", one)]
    command = [DINORAY, "correspond", str(store), "often", "--pairs", f"knn:{IMAGES - 1}", *given]
    tables = store / "matches" / "often"

    def commits(table: str) -> int:
        return len(list((tables / table / "_delta_log").glob("*.json")))

    moments: list[Callable[[], bool]] = [
        (tables / "settings.json").exists,
        lambda: commits("matches") > commits("pairs") > 0,
        lambda: commits("pairs") >= 6,
    ]
    for happened in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait_for(happened, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = commits("pairs")
    _wait_for(lambda: commits("pairs") > before, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any(task in " ".join(child.cmdline()) for task in ("match_pairs", "load_images"))
    ]
    for worker in workers:
        worker.kill()
    assert workers and process.wait(timeout=300) == 0
    assert len(pairs_of(store, "often")) == 28
    run(store, "undisturbed", f"knn:{IMAGES - 1}")
    assert _points(store, "often") == _points(store, "undisturbed")
    assert verify.run(settings(), store=str(store)).problems == []


def _wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.0005)


def _points(store: Path, name: str) -> set[tuple[object, ...]]:
    columns = ("image_a", "image_b", "row_a", "col_a", "row_b", "col_b", "rank")
    return {tuple(row[column] for column in columns) for row in rows_of(store, name, "matches")}


def test_duckdb_reads_both_tables(extracted: tuple[Path, Path]) -> None:
    _, store = extracted
    run(store, "sql", "knn:1")
    pairs, matches = (
        DeltaTable(store / "matches" / "sql" / table).to_pyarrow_dataset() for table in ("pairs", "matches")
    )
    joined = duckdb.sql("SELECT p.source, p.score, m.* FROM pairs AS p JOIN matches AS m USING (image_a, image_b)")
    rows = joined.fetchall()
    assert len(rows) == len(rows_of(store, "sql", "matches")) > 0
    assert {row[0] for row in rows} == {"knn"} and all(0 < row[1] <= 1.0001 for row in rows)
    assert {"image_a", "row_a", "y_b"} <= set(matches.schema.names) and "kept" in pairs.schema.names


def test_the_documented_query_runs_as_shown(extracted: tuple[Path, Path], tmp_path: Path) -> None:
    _, store = extracted
    run(store, "nearest", "knn:3")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "store").symlink_to(store)
    query = python_of_section("docs/correspond.md", "A query")
    done = subprocess.run([sys.executable, "-c", query], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "similarity" in done.stdout, done.stderr


def test_verify_names_pairs_that_are_there_twice_or_lost_matches(tmp_path: Path) -> None:
    store = hand_made_store(tmp_path, "abc")
    tables, report = by_hand(store, "m", ["ab", "ac"])
    _, again = by_hand(store, "m", ["ba"])
    tables.commit([report], "r9")
    assert verify.run(settings(), store=store.uri).problems == []
    commit_by_hand(tables.pairs, [again.pairs], [], "r9")
    missing = f"matches/m: b and a have 0 matches, their pair says {again.kept['b', 'a']}"
    found = verify.run(settings(), store=store.uri).problems
    assert sorted(found) == sorted(["matches/m: a and b are a pair twice", missing])


def test_stats_count_pairs_and_matches(tmp_path: Path) -> None:
    store = hand_made_store(tmp_path, "abc")
    assert stats.run(settings(), store=store.uri).results["matches"] == {}
    tables, report = by_hand(store, "near", ["ab", "ac"])
    tables.commit([report], "r9")
    by_hand(store, "none", ["bc"])  # begun, nothing committed
    found = stats.run(settings(), store=store.uri).results["matches"]
    assert list(found) == ["near", "none"]
    near = {name: found["near"][name] for name in ("pairs", "matches", "without_matches", "files")}
    kept = list(report.kept.values())
    assert near == {"pairs": 2, "matches": sum(kept), "without_matches": kept.count(0), "files": 2}
    assert set(found["none"].values()) == {0}
    shown = CliRunner().invoke(app, ["stats", store.uri], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and f"2 pairs (0 without), {sum(kept)} matches" in shown.stdout, shown.output


@pytest.mark.usefixtures("ray")
def test_a_store_in_a_bucket(s3: S3Server) -> None:
    options = [f"storage.options.{key}={value}" for key, value in s3.options.items()]
    store = Store.create(f"s3://{BUCKET}/correspond", settings(*options))
    add(store, "r1", "abc")
    result = run(store.uri, "m", "all", *options)
    assert (result.matched, result.bytes_read > 0) == (3, True)
    assert run(store.uri, "m", "all", *options).already_done == 3
    assert verify.run(settings(*options), store=store.uri).problems == []


# bad requests


def sentence(store: Path | str, name: str, pairs: str, *overrides: str) -> str:
    options = [part for one in overrides for part in ("--set", one)]
    result = CliRunner().invoke(app, ["correspond", str(store), name, "--pairs", pairs, *options])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("dinoray: ")


def test_bad_requests_are_one_sentence_each(tmp_path: Path) -> None:
    store = hand_made_store(tmp_path, "abc")
    (tmp_path / "unknown.csv").write_text("image_a,image_b\na,x\ny,b\nz,w\nv,a\n")
    (tmp_path / "columns.csv").write_text("image_a,second\na,b\n")
    (tmp_path / "same.csv").write_text("image_a,image_b\na,a\n")
    (tmp_path / "broken.jsonl").write_text('{"image_a": "a"}\n')
    (tmp_path / "broken.parquet").write_text("no Parquet")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("image_a,image_b\n")
    (tmp_path / "twice.csv").write_text("image_a,image_b,image_a\na,b,c\n")
    (tmp_path / "blank.csv").write_text("image_a,image_b\na,\n")
    (tmp_path / "null.jsonl").write_text('{"image_a": "a", "image_b": null}\n')
    pq.write_table(pa.table({"image_a": ["a", None], "image_b": ["b", "c"]}), tmp_path / "null.parquet")
    assert "no column image_a (it has none)" in sentence(store.uri, "m", str(tmp_path / "empty.csv"))
    assert "lists no two different images" in sentence(store.uri, "m", str(tmp_path / "header.csv"))
    assert "several columns image_a" in sentence(store.uri, "m", str(tmp_path / "twice.csv"))
    assert "does not have: ''. Extract" in sentence(store.uri, "m", str(tmp_path / "blank.csv"))
    assert "line 1 has null for image_b" in sentence(store.uri, "m", str(tmp_path / "null.jsonl"))
    assert "1 empty value where" in sentence(store.uri, "m", str(tmp_path / "null.parquet"))
    said = sentence(store.uri, "m", str(tmp_path / "unknown.csv"))
    assert "names images that the store does not have: v, w, x and 2 more." in said
    assert "no column image_b (it has image_a, second)" in sentence(store.uri, "m", str(tmp_path / "columns.csv"))
    assert "There are no pairs to match" in sentence(store.uri, "m", str(tmp_path / "same.csv"))
    assert "line 1 is not an object with" in sentence(store.uri, "m", str(tmp_path / "broken.jsonl"))
    assert "cannot be read" in sentence(store.uri, "m", str(tmp_path / "broken.parquet"))
    assert "does not exist" in sentence(store.uri, "m", str(tmp_path / "nowhere.csv"))
    for pairs in ("knn:0", "knn:x", "knn", "every"):
        assert f"correspond.pairs is {pairs}, but" in sentence(store.uri, "m", pairs)
    assert "but the store's patches have" in sentence(store.uri, "m", "all", "correspond.descriptor=descriptor_key9")
    assert "have descriptor: give one" in sentence(store.uri, "m", "all", "correspond.descriptor=descriptor_key9")
    assert "NAME is '../m'" in sentence(store.uri, "../m", "all")
    assert "There is no store at" in sentence(tmp_path / "nowhere", "m", "all")
    assert not (tmp_path / "store" / "matches").exists(), "a refused request leaves nothing"


def test_other_settings_need_another_name(tmp_path: Path) -> None:
    store = hand_made_store(tmp_path, "ab")
    by_hand(store, "m", ["ab"])
    said = sentence(store.uri, "m", "all", "correspond.num_pairs=3", "correspond.keep=all")
    assert 'correspond.keep: stored "selected", requested "all"; correspond.num_pairs: stored 10, requested 3' in said


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("store.every=2", "whole grid of patches (store.every=2)"),
        ("store.patches=none", "whole grid of patches (store.patches=none)"),
        ("store.patches=salient", "whole grid of patches (store.patches=salient)"),
        ("features.saliency=false", "has no saliency"),
    ],
)
def test_stores_that_cannot_be_matched(tmp_path: Path, override: str, says: str) -> None:
    store = Store.create(str(tmp_path / "store"), settings(override))
    assert says in sentence(store.uri, "m", "all")


def test_stores_without_what_pairs_need(tmp_path: Path) -> None:
    empty = Store.create(str(tmp_path / "empty"), settings())
    assert "has no images yet" in sentence(empty.uri, "m", "all")
    add_images(empty, "r1", [source("a", 0), source("b", 1)])
    assert "none has a label" in sentence(empty.uri, "m", "all")
    table = images_table(["x", "x"])
    with pytest.raises(RequestError, match="2 images of 2 have no embedding"):
        choose_pairs("knn:1", table, {})
    one = Store.create(str(tmp_path / "one"), settings())
    add_images(one, "r1", [source("a", 0)])
    assert "the store has 1 image" in sentence(one.uri, "m", "knn:3")
