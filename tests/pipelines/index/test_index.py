"""index and search on stores made by hand: what is found, what an update changes, what is refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flipped_bits import flip_bit, flipped_bits
from hand_made import source
from indices_by_hand import change_manifest
from small_runs import as_options, photo, settings
from typer.testing import CliRunner, Result

from dino_ops.extractor import ImageFeatures
from dino_ops.nearest import unit
from pipelines.cli import app
from pipelines.errors import JobError, RequestError
from pipelines.extract.shards import ShardWriter
from pipelines.index import job as index
from pipelines.index import search
from pipelines.results import index_publishing
from pipelines.results import indices as index_files
from pipelines.results.indices import Manifest
from pipelines.settings.sections import Config
from pipelines.store import transactions
from pipelines.store.changes import Change
from pipelines.store.extraction import Committer, ShardReport, drop_images
from pipelines.store.snapshots import snapshot
from pipelines.store.store import Store
from pipelines.upkeep import compact, verify

GRID, DIMENSION, PATCH = (3, 4), 8, 16
KINDS = ("flat", "hnsw")  # ivfpq needs more vectors than are quick to store: see tests/dino_ops/test_nearest.py


def features(image_id: str, version: str) -> ImageFeatures:
    """Random features, different for every image and version of it."""
    generator = np.random.default_rng(zlib.crc32(f"{image_id} {version}".encode()))
    y, x = (PATCH * (axis.astype(np.float32) + 0.5) for axis in np.mgrid[: GRID[0], : GRID[1]])
    return ImageFeatures(
        descriptor=generator.standard_normal((*GRID, DIMENSION), np.float32),
        extra={},
        saliency=generator.random(GRID, np.float32),
        embedding=generator.standard_normal(DIMENSION, np.float32),
        y=y,
        x=x,
        width=GRID[1] * PATCH,
        height=GRID[0] * PATCH,
        model_width=GRID[1] * PATCH,
        model_height=GRID[0] * PATCH,
    )


def add(store: Store, run_id: str, *image_ids: str, version: str = "v1", uri: str | None = None) -> None:
    """Commit one shard of images."""
    writer = ShardWriter(store.uri, store.config, run_id)
    for position, image_id in enumerate(image_ids):
        row = source(image_id, position, version)
        writer.add(row | ({"uri": uri} if uri else {}), features(image_id, version))
    patches, images = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    changed = set(image_ids) & set(store.images.read(["image_id"])["image_id"].to_pylist())
    Committer(store, run_id, changed).commit([report], {image_id: (10, version) for image_id in image_ids})


def names(count: int, first: int = 0) -> list[str]:
    return [f"{number:03d}" for number in range(first, first + count)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Store]:
    def make(*overrides: str, images: int = 20) -> Store:
        store = Store.create(str(tmp_path / "store"), settings(*overrides))
        half = images // 2
        for run_id, ids in (("r1", names(half)), ("r2", names(images - half, half))):
            if ids:
                add(store, run_id, *ids)
        return store

    return make


def asked(*overrides: str) -> Config:
    return settings(*(f"index.{one}" for one in overrides))


def found(store: Store, image: str, name: str = "main", **more: Any) -> list[dict[str, Any]]:
    return search.run(settings(), store=store.uri, name=name, image=image, **more).results


def answers(store: Store, name: str, ids: list[str]) -> list[list[tuple[str, float]]]:
    return [[(row["image_id"], row["similarity"]) for row in found(store, one, name, top=5)] for one in ids]


def dinoray(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(store: Store, name: str = "main") -> set[str]:
    return {path.name for path in (Path(store.uri) / "index" / name).iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_images_by_cosine(kind: str, make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked(f"kind={kind}"), store=store.uri, name="main")
    vectors = unit(np.stack([features(one, "v1").embedding for one in names(20)]))
    cosine = vectors[7] @ vectors.T
    cosine[7] = -2  # the query itself is left out
    expected = np.argsort(-cosine)[:5]
    rows = found(store, "007", top=5)
    assert [row["image_id"] for row in rows] == [f"{at:03d}" for at in expected]
    np.testing.assert_allclose([row["similarity"] for row in rows], cosine[expected], atol=1e-5)
    assert rows[0]["uri"] == f"/in/{rows[0]['image_id']}"


@pytest.mark.parametrize("pooling", ["mean", "gem"])
def test_the_nearest_images_by_pooled_patches(pooling: str, make: Callable[..., Store]) -> None:
    store = make("store.dtype=float32")
    index.run(asked("of=pooled", f"pooling={pooling}"), store=store.uri, name="main")
    patches = np.stack([features(one, "v1").descriptor for one in names(20)]).reshape(20, -1, DIMENSION)
    pooled = patches.mean(1) if pooling == "mean" else (patches.clip(1e-6) ** 3).mean(1) ** (1 / 3)
    cosine = unit(pooled)[3] @ unit(pooled).T
    assert [row["image_id"] for row in found(store, "003", top=4)] == [f"{at:03d}" for at in np.argsort(-cosine)[1:5]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_where_a_part_occurs(dtype: str, make: Callable[..., Store]) -> None:
    store = make(f"store.dtype={dtype}")
    index.run(asked("of=patches"), store=store.uri, name="main")
    rows = found(store, "005", box="16,0,48,20", top=6)  # the middle two patches of the first row
    descriptors = np.stack([features(one, "v1").descriptor for one in names(20)]).reshape(-1, DIMENSION)
    cells = GRID[0] * GRID[1]
    cosine = (unit(descriptors)[[5 * cells + 1, 5 * cells + 2]] @ unit(descriptors).T).max(0)
    cosine[[5 * cells + 1, 5 * cells + 2]] = -2
    best = np.argsort(-cosine)[:6]
    np.testing.assert_allclose([row["similarity"] for row in rows], cosine[best], atol=0.03)
    if dtype != "int8":
        assert [(int(row["image_id"]) * GRID[0] + row["row"]) * GRID[1] + row["col"] for row in rows] == best.tolist()
    for row in rows:
        assert (row["y"], row["x"]) == (PATCH * (row["row"] + 0.5), PATCH * (row["col"] + 0.5))
        assert row["query_row"] == 0 and row["query_col"] in (1, 2)


def test_a_box_between_patches_takes_the_nearest_patch(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked("of=patches"), store=store.uri, name="main")
    assert {(row["query_row"], row["query_col"]) for row in found(store, "005", box="17,17,20,20")} == {(1, 1)}


@pytest.mark.parametrize("of", ["embeddings", "pooled", "patches"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_answers_as_a_fresh_build_does(of: str, kind: str, make: Callable[..., Store]) -> None:
    store = make()
    config = asked(f"of={of}", f"kind={kind}")
    index.run(config, store=store.uri, name="main")
    add(store, "r3", *names(5, 20))
    add(store, "r4", "001", "012", version="v2")
    drop_images(store, ["003", "014"], "r5")
    result = index.run(config, store=store.uri, name="main")
    assert (result.status, result.added, result.changed, result.removed) == ("done", 5, 2, 2)
    assert result.rebuilt == "" and result.images == 23
    index.run(config, store=store.uri, name="fresh")
    more = {"box": "0,0,40,40"} if of == "patches" else {}
    for image in ("001", "012", "021", "007"):
        updated, fresh = (found(store, image, name, top=8, **more) for name in ("main", "fresh"))
        assert updated == fresh
        assert not {"003", "014"} & {row["image_id"] for row in updated}


def test_an_index_with_nothing_new_is_left_alone(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")
    before = files(store)
    assert index.run(asked(), store=store.uri, name="main").status == "unchanged"
    assert files(store) == before
    shown = dinoray("index", store.uri, "main", *as_options())
    assert shown.exit_code == 0 and "up to date: nothing to do" in shown.stdout


def test_a_graph_with_many_removed_images_is_built_again(make: Callable[..., Store]) -> None:
    store = make()
    config = asked("kind=hnsw")
    index.run(config, store=store.uri, name="main")
    drop_images(store, names(3), "r3")
    few = index.run(config, store=store.uri, name="main")
    assert (few.rebuilt, few.dead, few.count) == ("", 3, 17)
    drop_images(store, names(3, 3), "r4")
    many = index.run(config, store=store.uri, name="main")
    assert "6 of its 20 vectors had been removed" in many.rebuilt and (many.dead, many.count) == (0, 14)
    assert len(found(store, "010", top=50)) == 13


def test_a_graph_that_is_built_again_stays_a_graph(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked("kind=hnsw"), store=store.uri, name="main")
    drop_images(store, names(6), "r3")
    again = index.run(asked(), store=store.uri, name="main")
    assert again.rebuilt and (again.kind, again.why) == ("hnsw", "index.kind asked for it")


@pytest.mark.parametrize("piece", ["vectors", "images"])
def test_a_damaged_file_is_a_sentence(piece: str, make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")
    manifest = index_files.read_manifest(store, "main")
    assert manifest is not None
    file = Path(store.uri) / "index" / "main" / manifest.segments[0].files[piece]
    file.write_bytes(file.read_bytes()[:-30])
    result = dinoray("search", store.uri, "main", "001")
    assert result.exit_code == 1 and "/index/main/" in result.stderr
    file.unlink()
    result = dinoray("search", store.uri, "main", "001")
    assert result.exit_code == 1 and "is gone: run the same command again, and `dinoray repair" in result.stderr


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_flipped_bit_of_an_index_is_a_sentence(kind: str, make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked(f"kind={kind}"), store=store.uri, name="main")
    manifest = index_files.read_manifest(store, "main")
    assert manifest is not None
    name = manifest.segments[0].files["vectors"]
    file = Path(store.uri) / "index" / "main" / name
    for _ in flipped_bits(file, range(file.stat().st_size), 40):
        with pytest.raises(JobError, match="is damaged"):
            index_files.read_parts(store, "main", manifest, index_files.read_dead(store, "main", manifest))
    flip_bit(file, file.stat().st_size // 2)
    (problem,) = verify.run(store.config, store=store.uri).problems
    assert name in problem and "its checksum is crc32:" in problem


def test_an_index_from_before_has_no_checksums_and_is_read(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")

    def without_checksums(content: dict[str, Any]) -> None:
        for segment in content["segments"]:
            assert segment.pop("checksums")

    change_manifest(store, "main", without_checksums)
    assert verify.run(store.config, store=store.uri).problems == []
    assert dinoray("search", store.uri, "main", "001").exit_code == 0


def test_another_kind_builds_the_index_again(make: Callable[..., Store]) -> None:
    store = make()
    first = index.run(asked(), store=store.uri, name="main")
    assert first.kind == "flat" and "20 vectors of 8 values are few enough" in first.why
    again = index.run(asked("kind=hnsw"), store=store.uri, name="main")
    assert again.kind == "hnsw" and "was asked for in place of flat" in again.rebuilt
    assert index.run(asked(), store=store.uri, name="main").status == "unchanged", "auto keeps what there is"


@pytest.mark.parametrize("dies_in", ["write_faiss", "pq.write_table", "storage.write_once"])
def test_a_run_that_dies_between_files_leaves_the_old_index(
    dies_in: str, make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")
    before, kept = answers(store, "main", ["005"]), files(store)
    version = Store.open(store.uri, settings()).images.version
    add(store, "r3", *names(5, 20))
    with monkeypatch.context() as patched:

        def die(*arguments: Any, **more: Any) -> None:
            raise SystemExit("killed")

        patched.setattr(f"pipelines.results.indices.{dies_in}", die)
        patched.setattr("pipelines.index.job.remove_files", lambda *arguments: None)  # a killed run cleans nothing
        patched.setattr("pipelines.index.job.RunReport.finish", lambda *arguments, **more: {})
        with pytest.raises(SystemExit):
            index.run(asked(), store=store.uri, name="main")
    assert kept <= files(store)
    manifest = index_files.read_manifest(store, "main")
    assert manifest is not None and manifest.images_version == version
    (part,) = index_files.read_parts(store, "main", manifest, index_files.read_dead(store, "main", manifest))
    assert len(part.nearest) == 20
    assert index.run(asked(), store=store.uri, name="main").added == 5
    assert len(answers(store, "main", ["005"])[0]) == len(before[0])


def test_a_run_that_fails_after_it_was_decided_removes_nothing_that_others_build_on(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")
    add(store, "r3", *names(5, 20))
    publish = transactions.publish

    def interrupted(*arguments: Any) -> None:
        """Another run updates the index while the first one tells what it did."""
        monkeypatch.setattr(transactions, "publish", publish)
        add(store, "r4", *names(5, 25))
        assert index.run(asked(), store=store.uri, name="main").added == 5
        raise KeyboardInterrupt

    monkeypatch.setattr(transactions, "publish", interrupted)
    assert index.run(asked(), store=store.uri, name="main").status == "interrupted"

    assert index.run(asked(), store=store.uri, name="main").status == "unchanged"
    assert verify.run(store.config, store=store.uri).problems == []
    for image_id in ("004", "022", "027"):
        assert answers(store, "main", [image_id])[0][0]


def test_a_first_index_counts_when_the_log_points_to_it(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is there before that: another run that comes then builds an index of its own."""
    store = make()
    transact = index_publishing.transact

    def late(*arguments: Any, **more: Any) -> None:
        monkeypatch.setattr(index_publishing, "transact", transact)
        assert index_files.highest_number(files(store)) == 1 and index_files.index_names(store) == []
        add(store, "r3", *names(5, 20))
        assert index.run(asked(), store=store.uri, name="main").added == 25
        transact(*arguments, **more)

    monkeypatch.setattr(index_publishing, "transact", late)
    assert index.run(asked(), store=store.uri, name="main").status == "unchanged"
    assert len(found(store, "022")) == 10 and verify.run(store.config, store=store.uri).problems == []


def test_an_index_from_before_transactions_is_read_and_taken_over(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")
    change_manifest(store, "main", lambda content: content.update(schema_version=1))
    transactions.transact(store.log, lambda _: Change(pointers={"index/main": None}), run_id="hand", command="index")
    assert index.run(asked(), store=store.uri, name="main").status == "unchanged"
    assert len(found(store, "002")) == 10
    add(store, "r3", *names(5, 20))
    assert index.run(asked(), store=store.uri, name="main").added == 5
    assert snapshot(store.log).pointers["index/main"].file == "index/main/manifest-2.json"
    assert len(found(store, "022")) == 10 and verify.run(store.config, store=store.uri).problems == []


@pytest.mark.parametrize("meanwhile", [0, 3])
def test_two_updates_at_once_come_one_after_the_other(
    meanwhile: int, make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one begins again from what the first one made. meanwhile: images that came after the first one."""
    store = make()
    index.run(asked(), store=store.uri, name="main")
    add(store, "r3", *names(5, 20))
    publish = index_publishing.publish

    def late(*arguments: Any) -> Manifest:
        monkeypatch.setattr("pipelines.index.job.publish", publish)
        index.run(asked(), store=store.uri, name="main")
        if meanwhile:
            add(store, "r4", *names(meanwhile, 30))
        return publish(*arguments)

    monkeypatch.setattr("pipelines.index.job.publish", late)
    result = index.run(asked(), store=store.uri, name="main")
    assert (result.status, result.added) == (("done", 3) if meanwhile else ("unchanged", 0))
    assert len(found(store, "022")) == 10 and verify.run(store.config, store=store.uri).problems == []
    manifest = index_files.read_manifest(store, "main")
    assert manifest is not None and manifest.images == 25 + meanwhile
    replaced = index_files.read_replaced_manifest(store, "main", manifest)
    assert replaced is not None
    kept = {index_files.manifest_file(one.number) for one in (replaced, manifest)}
    leftover = {index_files.manifest_file(3)} if meanwhile == 0 else set()
    assert files(store) - leftover == manifest.files | replaced.files | kept, (
        "nothing of the attempt that failed is left"
    )


def test_a_dry_run_counts_and_writes_nothing(make: Callable[..., Store]) -> None:
    store = make()
    result = dinoray("index", store.uri, "main", "--dry-run", *as_options())
    assert "20 images to add, 0 changed, 0 removed. Nothing was written." in result.stdout
    assert not (Path(store.uri) / "index").exists()


def test_no_such_index_names_those_there_are(make: Callable[..., Store]) -> None:
    store = make()
    with pytest.raises(RequestError, match=r"no index main .there is none yet.: `dinoray index"):
        found(store, "001")
    index.run(asked(), store=store.uri, name="other")
    with pytest.raises(RequestError, match="there are other"):
        found(store, "001")


def test_an_index_older_than_the_table_is_refused(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked("of=pooled"), store=store.uri, name="main")
    add(store, "r3", "new")
    with pytest.raises(RequestError, match=r"older than the store .* update it with .* --set index\.of=pooled"):
        found(store, "001")


def test_an_index_of_another_spec_is_refused(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")
    change_manifest(store, "main", lambda content: content.update(fingerprint="another"))
    for job in (lambda: found(store, "001"), lambda: index.run(asked(), store=store.uri, name="main")):
        with pytest.raises(RequestError, match="made of features of another spec"):
            job()


def test_other_settings_under_the_same_name_are_refused(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked("of=pooled"), store=store.uri, name="main")
    with pytest.raises(RequestError, match=r"has index\.pooling mean, requested gem: give"):
        index.run(asked("of=pooled", "pooling=gem"), store=store.uri, name="main")


def test_an_empty_store_is_refused(make: Callable[..., Store]) -> None:
    store = make(images=0)
    with pytest.raises(RequestError, match="has no images yet: run `dinoray extract"):
        index.run(asked(), store=store.uri, name="main")
    with pytest.raises(RequestError, match="has no images yet: run `dinoray extract"):
        found(store, "001")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["kind=ivfpq"], "trained on at least 10,240 vectors, and here are 20"),
        (["memory_gb=1e-7"], "index.memory_gb is 1e-07: give more"),
        (["kind=hnsw", "memory_gb=1e-7"], "An index of kind hnsw takes"),
        (["of=patches", "descriptor=descriptor_key9"], "the store's patches have descriptor"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: list[str], said: str, make: Callable[..., Store]) -> None:
    store = make()
    with pytest.raises(RequestError, match=said):
        index.run(asked(*overrides), store=store.uri, name="main")


def test_an_unknown_kind_ends_with_2(make: Callable[..., Store]) -> None:
    result = dinoray("index", make().uri, "main", "--set", "index.kind=tree")
    assert result.exit_code == 2 and "index.kind is 'tree', but it should be 'auto', 'flat'" in result.stderr


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ("1,2,3", "must be four numbers"),
        ("a,b,c,d", "must be four numbers"),
        ("0,0,65,10", "does not lie in the image, which is 64 pixels wide and 48 high"),
        ("10,10,10,20", "does not lie in the image"),
        ("nan,0,10,10", "does not lie in the image"),
    ],
)
def test_a_box_that_does_not_fit_is_refused(box: str, said: str, make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked("of=patches"), store=store.uri, name="main")
    result = dinoray("search", store.uri, "main", "001", "--box", box)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_box_and_index_must_go_together(make: Callable[..., Store]) -> None:
    store = make()
    index.run(asked("of=patches"), store=store.uri, name="patches")
    index.run(asked(), store=store.uri, name="main")
    with pytest.raises(RequestError, match="--box needs an index of patches"):
        found(store, "001", box="0,0,9,9")
    with pytest.raises(RequestError, match="index patches is of patches: give --box"):
        found(store, "001", "patches")


def test_an_image_that_is_nowhere_or_none_is_refused(make: Callable[..., Store], tmp_path: Path) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")
    with pytest.raises(RequestError, match=r"nowhere\.jpg does not exist: give a path, a URI or an image_id"):
        found(store, "nowhere.jpg")
    with pytest.raises(RequestError, match="cannot be read"):
        found(store, str(tmp_path))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(RequestError, match=r"broken\.jpg cannot be used: "):
        found(store, str(broken))


def test_a_store_of_a_weights_file_asks_for_it(make: Callable[..., Store], tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"some")
    store = make(f"model.weights={weights}")
    index.run(asked(), store=store.uri, name="main")
    photo(1).save(tmp_path / "query.png")
    query = {"store": store.uri, "name": "main", "image": str(tmp_path / "query.png")}
    with pytest.raises(RequestError, match=r"made with a weights file .* give it again"):
        search.run(settings(), **query)
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(RequestError, match="are not those of the store"):
        search.run(settings(f"model.weights={tmp_path / 'other.pth'}"), **query)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["main", "001"], "The index main is older than the store (it covers version 2 of the images table, which is"),
        (["parts", "001", "--box", "60,0,70,9"], "--box 60,0,70,9 does not lie in the image, which is 64 pixels wide"),
        (["other", "001"], "has no index other (there are main, parts): `dinoray index"),
        (
            ["parts", "no-such-image.jpg", "--box", "0,0,9,9"],
            "The image no-such-image.jpg does not exist: give a path,",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_for_people_and_programs(
    arguments: list[str], said: str, make: Callable[..., Store]
) -> None:
    store = make()
    index.run(asked(), store=store.uri, name="main")
    if arguments[0] == "main":
        add(store, "r3", "new")
    index.run(asked("of=patches"), store=store.uri, name="parts")
    shown = dinoray("search", store.uri, *arguments)
    (line,) = shown.stderr.splitlines()
    assert shown.exit_code == 2 and said in line and shown.stdout == ""
    as_json = json.loads(dinoray("search", store.uri, *arguments, "--json").stdout)
    assert said in as_json["error"] and as_json["exit_code"] == 2


@pytest.mark.parametrize("command", [["index", "main"], ["search", "main", "001"]])
def test_an_empty_store_is_one_sentence(command: list[str], make: Callable[..., Store]) -> None:
    store = make(images=0)
    shown = dinoray(command[0], store.uri, *command[1:])
    (line,) = shown.stderr.splitlines()
    assert shown.exit_code == 2 and f"The store {store.uri} has no images yet: run `dinoray extract INPUT" in line


@pytest.mark.parametrize("name", ["../x", "", "a/b"])
def test_a_name_is_a_name(name: str, make: Callable[..., Store]) -> None:
    with pytest.raises(RequestError, match="it names a folder"):
        index.run(asked(), store=make().uri, name=name)


def test_what_a_first_run_left_that_was_killed_is_swept(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    folder = Path(store.uri) / "index" / "main"
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.index.job.publish", _killed)
        patched.setattr("pipelines.index.job.remove_files", lambda *_: None)
        with pytest.raises(SystemExit):
            index.run(asked(), store=store.uri, name="main")
    (folder / "notes.parquet").write_bytes(b"somebody's")
    assert len(files(store)) == 3
    assert compact.run(settings("compact.retention_hours=168"), store=store.uri).vacuumed == 0
    assert compact.run(settings("compact.retention_hours=0"), store=store.uri).vacuumed >= 2
    assert files(store) == {"notes.parquet"}


def _killed(*_: Any) -> None:
    raise SystemExit
