"""dinoray cosegment: which sets, what its tables say against generated scenes, what is done again, and odd sets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from local_ray import use_local_ray
from PIL import Image
from set_scenes import GRID, PATCH_PIXELS, Scene, add_scenes, scene
from small_runs import settings
from tables_by_hand import commit_by_hand

from pipelines.cosegment import job as cosegment
from pipelines.cosegment import tasks as cosegment_tasks
from pipelines.cosegment import worker as cosegment_worker
from pipelines.errors import JobError, RequestError
from pipelines.results.cluster_models import Level, Model, Progress, model_uri, write_model
from pipelines.results.cluster_statistics import Statistics
from pipelines.results.clusters import ClusterTables
from pipelines.results.part_checks import disagreements
from pipelines.results.parts import PartTables
from pipelines.settings.loading import load_config
from pipelines.store.extraction import drop_images
from pipelines.store.schemas import ASSIGNMENTS
from pipelines.store.store import Store
from pipelines.upkeep import stats, verify

PLAIN = ("cosegment.refine=false", "cosegment.num_parts=2", "cosegment.sample_interval=3")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_ray(monkeypatch, cosegment)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of more than four images are shared out."""
    monkeypatch.setattr(cosegment_tasks, "IMAGES_PER_PLAIN_TASK", (4, 4))
    monkeypatch.setattr(cosegment_tasks, "IMAGES_PER_REFINING_TASK", (4, 4))


def new_store(folder: Path, *overrides: str) -> Store:
    """A store whose images the model sees as they are."""
    spec = ("model.name=vit_tiny_patch16_224", "model.weights=random", "image.native=true", "store.dtype=float32")
    return Store.create(str(folder), load_config([], [*spec, *overrides]))


def animals(count: int = 5, first: int = 0) -> dict[str, Scene]:
    return {
        f"{kind}/{number:02d}.jpg": scene(number + shift)
        for kind, shift in (("cat", 100), ("dog", 200))
        for number in range(first, first + count)
    }


@pytest.fixture
def scenes() -> dict[str, Scene]:
    return animals()


@pytest.fixture
def store(tmp_path: Path, scenes: dict[str, Scene]) -> Store:
    """Five cats and five dogs, and one image at the top that has no label."""
    made = new_store(tmp_path / "store")
    add_scenes(made, 1, scenes)
    add_scenes(made, 2, {"loose.jpg": scene(7)})
    return made


def run(store: Store, name: str = "animals", *overrides: str, **options: Any) -> cosegment.Result:
    return cosegment.run(settings(*PLAIN, *overrides), store=store.uri, name=name, **options)


def rows(store: Store, name: str = "animals") -> dict[tuple[str, str], dict[str, Any]]:
    """(set_id, image_id) -> row of images; every one once."""
    found = DeltaTable(f"{store.uri}/parts/{name}/images").to_pyarrow_table().to_pylist()
    by_key = {(row["set_id"], row["image_id"]): row for row in found}
    assert len(by_key) == len(found), "an image is there twice in a set"
    tables = PartTables.open_existing(store.uri, name, {})
    assert tables and list(disagreements(tables)) == []
    return by_key


def mask(row: dict[str, Any], column: str = "mask_png") -> np.ndarray:
    image = Image.open(io.BytesIO(row[column]))
    assert image.format == "PNG" and image.mode == "L"
    return np.asarray(image)


def patch_parts(store: Store, name: str = "animals") -> dict[tuple[str, str], np.ndarray]:
    """(set_id, image_id) -> the grid of part ids, as SQL finds it."""
    files = DeltaTable(f"{store.uri}/parts/{name}/patches").file_uris()
    found = duckdb.sql(
        f"select set_id, image_id, max(row) + 1, max(col) + 1, list(part_id order by row, col) "
        f"from read_parquet({files}) group by all"
    ).fetchall()
    return {(set_id, image_id): np.array(parts).reshape(h, w) for set_id, image_id, h, w, parts in found}


def check_parts(parts: np.ndarray, kinds: np.ndarray) -> None:
    """Parts of a grid are the scene's, whatever their numbers."""
    np.testing.assert_array_equal(parts < 0, kinds > 1)
    assert all(len(np.unique(parts[kinds == kind])) == 1 for kind in (0, 1))
    assert len(np.unique(parts[kinds < 2])) == 2


def test_masks_by_label(store: Store, scenes: dict[str, Scene]) -> None:
    result = run(store)
    assert (result.status, result.sets, result.images, result.segmented, result.pending) == ("done", 2, 10, 10, 10)
    assert result.messages == ["1 image without a label is in no set."]
    found, patches = rows(store), patch_parts(store)
    assert found.keys() == patches.keys() == {(image_id[:3], image_id) for image_id in scenes}
    numbers: dict[str, set[tuple[int, int]]] = {}
    for (set_id, image_id), row in found.items():
        kinds, parts = scenes[image_id].kinds, patches[set_id, image_id]
        check_parts(parts, kinds)
        numbers.setdefault(set_id, set()).add((parts[kinds == 0][0], parts[kinds == 1][0]))
        pixels = mask(row)
        np.testing.assert_array_equal(pixels, (parts + 1).repeat(PATCH_PIXELS, 0).repeat(PATCH_PIXELS, 1))
        np.testing.assert_array_equal(mask(row, "foreground_png"), np.where(pixels > 0, 255, 0))
        assert row["foreground_fraction"] == pytest.approx((pixels > 0).mean())
        assert row["note"] is None and row["run_id"].startswith("20200101")
    assert all(len(pairs) == 1 for pairs in numbers.values()), "a part has one number in all images of a set"
    report = json.loads(Path(store.uri, "runs", f"{result.run_id}.json").read_text())
    assert (report["status"], report["command"], report["result"]["segmented"]) == ("done", "cosegment", 10)


def test_a_second_run_has_nothing_to_do_and_other_settings_are_refused(store: Store) -> None:
    run(store)
    before = DeltaTable(f"{store.uri}/parts/animals/images").version()
    again = run(store)
    assert (again.status, again.segmented, again.already_done, again.pending) == ("done", 0, 10, 0)
    assert DeltaTable(f"{store.uri}/parts/animals/images").version() == before
    with pytest.raises(RequestError, match=r"num_parts: stored 2, requested 3.*another NAME"):
        run(store, "animals", "cosegment.num_parts=3")
    with pytest.raises(RequestError, match=r'sets: stored "label", requested "directory"'):
        run(store, sets="directory")
    assert run(store, "other", "cosegment.num_parts=3").segmented == 10


def test_a_set_whose_members_changed_is_done_again_and_no_other(store: Store, scenes: dict[str, Scene]) -> None:
    run(store)
    before = rows(store)
    changed = {"cat/00.jpg": scene(900)}
    add_scenes(store, 3, changed, version="v2")
    drop_images(store, ["dog/04.jpg"], "test")
    plan = run(store, dry_run=True)
    assert (plan.status, plan.pending, plan.pending_sets, plan.already_done, plan.outdated) == ("dry_run", 9, 2, 0, 10)
    add_scenes(store, 4, {"bird/0.jpg": scene(1), "bird/1.jpg": scene(2)})
    result = run(store)
    assert (result.segmented, result.outdated, result.already_done) == (11, 10, 0)
    after = rows(store)
    assert {key for key in after if key[0] == "dog"} == {("dog", f"dog/0{n}.jpg") for n in range(4)}
    for set_id in ("cat", "dog"):
        versions = {row["set_version"] for (of, _), row in after.items() if of == set_id}
        assert len(versions) == 1 and versions.isdisjoint(row["set_version"] for row in before.values())
    check_parts(patch_parts(store)["cat", "cat/00.jpg"], changed["cat/00.jpg"].kinds)
    birds = {key: row for key, row in after.items() if key[0] == "bird"}
    add_scenes(store, 5, {"dog/04.jpg": scenes["dog/04.jpg"]})
    assert run(store).segmented == 5
    last = rows(store)
    assert all(last[key] | {"shard": ""} == row | {"shard": ""} for key, row in birds.items())


def test_a_label_that_is_gone_takes_its_rows_along(store: Store) -> None:
    run(store)
    drop_images(store, [f"dog/0{number}.jpg" for number in range(5)], "test")
    result = run(store)
    assert (result.outdated, result.segmented, result.already_done) == (5, 0, 5)
    assert {set_id for set_id, _ in rows(store)} == {"cat"}


def test_sets_by_directory(store: Store) -> None:
    result = run(store, sets="directory")
    assert (result.source, result.sets, result.segmented, result.messages) == ("directory", 3, 11, [])
    found = rows(store)
    assert {set_id for set_id, _ in found} == {"cat", "dog", "."}
    assert found[".", "loose.jpg"]["note"] == "the only image of its set"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_sets_of_a_file(store: Store, tmp_path: Path, ending: str, scenes: dict[str, Scene]) -> None:
    """An image may be in several sets; sets of an earlier file stay."""
    listed = [
        ("cat/00.jpg", "1"),
        ("cat/01.jpg", "1"),
        ("dog/00.jpg", "1"),
        ("cat/00.jpg", "odd, \n"),
        ("cat/00.jpg", "1"),
    ]
    file = tmp_path / f"sets.{ending}"
    columns = {"note": [None] * 5, "image_id": [one for one, _ in listed], "set_id": [one for _, one in listed]}
    if ending == "csv":
        file.write_text("note,image_id,set_id\n" + "".join(f',{image},"{name}"\n' for image, name in listed))
    elif ending == "jsonl":
        file.write_text("".join(json.dumps({"image_id": a, "set_id": b}) + "\n" for a, b in listed))
    else:
        pq.write_table(pa.table(columns), file)
    result = run(store, sets=str(file))
    assert (result.source, result.sets, result.images, result.segmented) == ("file", 2, 4, 4)
    assert result.messages == [f"1 row that {file} lists again was skipped."]
    found = rows(store)
    assert found.keys() == {
        *(("1", one) for one in ("cat/00.jpg", "cat/01.jpg", "dog/00.jpg")),
        ("odd, \n", "cat/00.jpg"),
    }
    check_parts(patch_parts(store)["1", "cat/00.jpg"], scenes["cat/00.jpg"].kinds)
    other = tmp_path / "other.csv"
    other.write_text("image_id,set_id\ndog/01.jpg,2\ndog/02.jpg,2\n")
    assert run(store, sets=str(other)).segmented == 2
    assert rows(store).keys() == found.keys() | {("2", "dog/01.jpg"), ("2", "dog/02.jpg")}
    drop_images(store, ["cat/01.jpg"], "test")  # of set 1, which is not asked for
    assert run(store, sets=str(other)).outdated == 3
    assert {set_id for set_id, _ in rows(store)} == {"2", "odd, \n"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"does not exist"),
        ("image_id,set_id\n", r"lists no images"),
        ("image_id,group\ncat/00.jpg,1\n", r"no column set_id \(it has image_id, group\)"),
        ("image_id,set_id\ncat/00.jpg,\n", r"1 empty value where a set_id should be"),
        ("image_id,set_id\na,1\nb,1\nc,1\nd,2\ne,2\n", r"does not have: a, b, c and 2 more"),
        ("image_id,set_id\na\n", r"cannot be read"),
        ("image_id,set_id,set_id\na,1,1\n", r"several columns set_id"),
    ],
)
def test_a_file_that_is_no_list_of_sets(store: Store, tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "sets.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RequestError, match=said):
        run(store, sets=str(file))


def test_requests_that_cannot_be_met(store: Store, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"sets is labels, but it must be label, directory"):
        run(store, sets="labels")
    with pytest.raises(RequestError, match=r"has no clusters words \(it has none\)"):
        run(store, sets="cluster:words")
    with pytest.raises(RequestError, match=r"have descriptor: give one"):
        run(store, "animals", "cosegment.descriptor=descriptor_key9")
    with pytest.raises(RequestError, match=r"num_parts is 300"):
        run(store, "animals", "cosegment.num_parts=300")
    with pytest.raises(RequestError, match=r"NAME is '../x'"):
        run(store, "../x")
    thin = new_store(tmp_path / "thin", "store.patches=salient")
    with pytest.raises(RequestError, match=r"whole grid of patches \(store.patches=salient\)"):
        run(thin)
    with pytest.raises(RequestError, match=r"no images yet"):
        run(new_store(tmp_path / "empty"))
    loose = new_store(tmp_path / "loose")
    add_scenes(loose, 1, {"a.jpg": scene(1)})
    with pytest.raises(RequestError, match=r"of 1 image none has a label; give --sets directory"):
        run(loose)
    assert not Path(store.uri, "parts").exists()


def add_clusters(store: Store, name: str, of: str, clusters: dict[str, int]) -> None:
    """A clustering of images, made by hand."""
    run_id = "20200102T000000Z-aaaaaa"
    tables = ClusterTables.open_or_make(store.uri, name, {})
    model = Model(Progress(run_id, {"of": of}, ""), [Level(np.eye(max(clusters.values()) + 1, 8))])
    write_model(model_uri(tables.uri, run_id), model, {})
    runs = {row["image_id"]: row["run_id"] for row in store.images.read(["image_id", "run_id"]).to_pylist()}
    listed = [
        {"image_id": one, "cluster_id": cluster, "distance": 0.0, "run_id": runs[one]}
        for one, cluster in sorted(clusters.items())
    ]
    file = tables.assignments.write_file(f"part-{run_id}-{0:012x}.parquet", pa.Table.from_pylist(listed, ASSIGNMENTS))
    tables.replace(model, [file], Statistics.zeros(model.k), False)


def test_sets_by_cluster(store: Store, scenes: dict[str, Scene]) -> None:
    add_clusters(store, "groups", "embeddings", {one: int(one[4:6]) % 2 for one in scenes if one != "dog/03.jpg"})
    result = run(store, sets="cluster:groups")
    assert (result.source, result.sets, result.segmented) == ("cluster:groups", 2, 9)
    assert "2 images not in the clusters groups" in result.messages[0] and "--update" in result.messages[0]
    assert {key for key in rows(store) if key[0] == "1"} == {
        ("1", f"{a}/0{n}.jpg") for a in ("cat", "dog") for n in (1, 3)
    } - {("1", "dog/03.jpg")}
    add_scenes(store, 3, {"cat/00.jpg": scene(1)}, version="v2")
    assert "3 images not in the clusters" in run(store, sets="cluster:groups", dry_run=True).messages[0]
    add_clusters(store, "words", "patches", dict.fromkeys(scenes, 0))
    with pytest.raises(RequestError, match=r"clusters words are of patches, and sets are of images"):
        run(store, "other", sets="cluster:words")


@pytest.mark.usefixtures("small_batches")
def test_a_large_set_is_fitted_on_a_sample_and_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = animals(11)
    store = new_store(tmp_path / "store")
    add_scenes(store, 1, scenes)
    result = run(store, "animals", "cosegment.fit_images=5")
    assert result.segmented == 22
    files = PartTables.open_or_make(store.uri, "animals", {}).images.files()
    assert sorted(file.rows for file in files.values()) == [3, 3, 4, 4, 4, 4]
    found = rows(store)
    for key, parts in patch_parts(store).items():
        check_parts(parts, scenes[key[1]].kinds)
        assert found[key]["note"] is None
    assert len(list(Path(store.uri, "parts", "animals", "models").iterdir())) == 2
    monkeypatch.setattr(cosegment_tasks, "IMAGES_PER_PLAIN_TASK", (100, 100))  # all at once, and yet fitted on few
    run(store, "few", "cosegment.fit_images=5")
    for key, row in rows(store, "few").items():
        np.testing.assert_array_equal(mask(row), mask(found[key]))
    run(store, "whole")  # fitted on all: the scenes are clear enough for the same masks
    for key, row in rows(store, "whole").items():
        np.testing.assert_array_equal(mask(row, "foreground_png"), mask(found[key], "foreground_png"))


@pytest.mark.usefixtures("small_batches")
def test_a_killed_run_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the earlier clusters, which a part of a set was segmented with."""
    store = new_store(tmp_path / "store")
    add_scenes(store, 1, animals(11))
    commit = PartTables.commit

    def interrupt_at_the_third(self: PartTables, *args: Any) -> Any:
        done = commit(self, *args)
        if len(self.images.files()) == 3:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patched:
        patched.setattr(PartTables, "commit", interrupt_at_the_third)
        stopped = run(store, "animals", "run.commit_seconds=1e-9")
    assert (stopped.status, stopped.exit_code) == ("interrupted", 130)
    first = rows(store)
    assert 0 < len(first) < 22
    fitted = len(list(Path(store.uri, "parts", "animals", "models").iterdir()))
    fits, fit = [], cosegment_worker._fit
    monkeypatch.setattr(cosegment_worker, "_fit", lambda *args: fits.append(args) or fit(*args))
    result = run(store)
    assert (result.segmented, result.already_done) == (22 - len(first), len(first))
    after = rows(store)
    assert len(after) == 22 and all(after[key] == row for key, row in first.items())
    assert fitted and len(fits) == 2 - fitted


def test_patches_whose_images_never_arrived_are_removed(store: Store) -> None:
    run(store)
    tables = PartTables.open_or_make(store.uri, "animals", {})
    path, file = next(iter(tables.patches.files().items()))
    stray = tables.patches.write_file("part-killed-000000000000.parquet", tables.patches.read_file(path))
    commit_by_hand(tables.patches, [stray], [], "killed")
    result = run(store)
    assert result.repaired == {"orphans_removed": 1} and result.segmented == 0
    Path(tables.patches.uri, path).unlink()  # and patches that are lost are made again
    tables.refresh()
    commit_by_hand(tables.patches, [], [path], "lost")
    assert run(store).segmented == file.rows // GRID**2
    assert len(rows(store)) == 10


def test_two_runs_at_once_leave_every_image_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each counts only what it did: here all images are outliers, which have no foreground and a note."""
    commit, entered = PartTables.commit, []
    outliers = ("cosegment.remove_outliers=true", "cosegment.outliers_threshold=1")

    def other_run_first(self: PartTables, *args: Any) -> Any:
        if not entered:
            entered.append(True)
            other = run(store, "animals", *outliers)
            assert (other.segmented, other.without_foreground, other.noted) == (10, 10, 10)
        return commit(self, *args)

    monkeypatch.setattr(PartTables, "commit", other_run_first)
    result = run(store, "animals", *outliers)
    assert (result.segmented, result.done_elsewhere) == (0, 10)
    assert (result.without_foreground, result.noted) == (0, 0)
    assert len(rows(store)) == 10


@pytest.mark.parametrize("step", ["drop", "commit"])
def test_images_change_while_a_run_is_at_work(store: Store, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """And another run does their sets before this one goes on, which was to do them with the earlier images."""
    run(store)
    add_scenes(store, 3, {"cat/00.jpg": scene(900)}, version="v2")
    original, entered = getattr(PartTables, step), []

    def other_run_first(self: PartTables, *args: Any, **named: Any) -> Any:
        if not entered:
            entered.append(True)
            add_scenes(store, 4, {"cat/00.jpg": scene(901), "cat/05.jpg": scene(902)}, version="v3")
            assert run(store).segmented == 6
        return original(self, *args, **named)

    monkeypatch.setattr(PartTables, step, other_run_first)
    result = run(store)
    assert (result.segmented, result.done_elsewhere) == (0, 5 if step == "commit" else 0)
    assert len({row["set_version"] for (set_id, _), row in rows(store).items() if set_id == "cat"}) == 1
    again = run(store)
    assert (again.pending, again.outdated, len(rows(store))) == (0, 0, 11)


@pytest.mark.parametrize("becomes", ["of an image that is gone", "unreadable"])
def test_a_file_of_sets_changes_while_a_run_is_at_work(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    """Sets that are gone are not kept; whatever else is wrong with the file is said."""
    file, commit, entered = tmp_path / "sets.csv", PartTables.commit, []
    file.write_text("image_id,set_id\ncat/00.jpg,one\ncat/01.jpg,one\n")

    def file_changes_first(self: PartTables, *args: Any) -> Any:
        if not entered:
            entered.append(True)
            drop_images(store, ["cat/00.jpg"], "20260101T000000Z-aaaaaa")
            if becomes == "unreadable":
                file.write_text("image_id\ncat/00.jpg\n")
        return commit(self, *args)

    monkeypatch.setattr(PartTables, "commit", file_changes_first)
    if becomes == "unreadable":
        with pytest.raises(RequestError, match="set_id"):
            run(store, sets=str(file))
    else:
        result = run(store, sets=str(file))
        assert (result.segmented, result.changed_meanwhile) == (0, 2)


def test_what_was_made_of_changed_images_is_not_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, entered = PartTables.commit, []

    def images_change_first(self: PartTables, *args: Any) -> Any:
        if not entered:
            entered.append(True)
            add_scenes(store, 3, {"cat/00.jpg": scene(900)}, version="v2")
        return commit(self, *args)

    monkeypatch.setattr(PartTables, "commit", images_change_first)
    result = run(store)
    assert (result.segmented, result.changed_meanwhile, result.done_elsewhere) == (5, 5, 0)
    assert any(message.startswith("5 images of sets whose members") for message in result.messages)
    assert {set_id for set_id, _ in rows(store)} == {"dog"}
    again = run(store)
    assert (again.segmented, again.outdated, len(rows(store))) == (5, 0, 10)


def test_a_run_replaces_what_another_made_of_fewer_images(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one was planned before the set got a new image, and committed after this one was."""
    commit, entered = PartTables.commit, []

    def older_run_first(self: PartTables, *args: Any) -> Any:
        if not entered:
            entered.append(True)
            with monkeypatch.context() as patched:
                patched.setattr(cosegment, "_images", lambda *_, **__: older)
                patched.setattr(cosegment.SetVersions, "__call__", lambda *_: None)
                patched.setattr(PartTables, "are_current", lambda self, current, rows: np.ones(len(rows), bool))
                assert run(store).segmented == 10
        return commit(self, *args)

    older = cosegment._images(store, with_embeddings=False)
    add_scenes(store, 3, {"cat/05.jpg": scene(902)})
    store.refresh()
    monkeypatch.setattr(PartTables, "commit", older_run_first)
    assert run(store).segmented == 6
    again = run(store)
    assert (again.pending, again.outdated, len(rows(store))) == (0, 0, 11)


def test_sets_without_a_common_object(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    few = scene(3, size=1, empty=True)
    add_scenes(
        store,
        1,
        {f"none/{number}.jpg": scene(number, empty=True) for number in range(4)}
        | {f"some/{number}.jpg": scene(number, empty=number == 3) for number in range(4)}
        | {"tiny/0.jpg": few},
    )
    result = run(store)
    assert (result.status, result.segmented, result.failed_sets) == ("done", 9, {})
    found = rows(store)
    for number in range(4):
        row = found["none", f"none/{number}.jpg"]
        assert "no salient cluster" in row["note"] and row["foreground_fraction"] == 0
        assert not mask(row).any() and not mask(row, "foreground_png").any()
    assert found["some", "some/3.jpg"]["note"] == "none of its patches is in the common foreground"
    assert not mask(found["some", "some/3.jpg"], "foreground_png").any()
    assert found["some", "some/0.jpg"]["note"] is None
    tiny = found["tiny", "tiny/0.jpg"]
    assert tiny["note"].startswith("the only image of its set") and mask(tiny).shape == (PATCH_PIXELS, PATCH_PIXELS)
    assert result.without_foreground == 4 + 1 + (not mask(tiny).any())
    assert (patch_parts(store)["none", "none/0.jpg"] == -1).all()


def test_outliers_have_empty_masks_and_do_not_vote(tmp_path: Path) -> None:
    """Three of eight images are something else: with their votes missing nothing is common to 75 %."""
    store = new_store(tmp_path / "store")
    others = {f"set/x{number}.jpg": scene(number, empty=True) for number in range(3)}
    for one in others.values():
        np.negative(one.features.embedding, out=one.features.embedding)
    add_scenes(store, 1, {f"set/{number}.jpg": scene(number) for number in range(5)} | others)
    run(store, "all")
    assert all("no salient cluster" in row["note"] for row in rows(store, "all").values())
    run(store, "without", "cosegment.remove_outliers=true")
    found = rows(store, "without")
    for (_, image_id), row in found.items():
        if image_id in others:
            assert row["note"] == "unlike the other images of its set, so its masks are empty"
            assert not mask(row).any() and (patch_parts(store, "without")["set", image_id] == -1).all()
        else:
            assert row["note"] is None and mask(row).any()


def test_a_set_of_outliers_only(store: Store) -> None:
    result = run(store, "animals", "cosegment.remove_outliers=true", "cosegment.outliers_threshold=1")
    assert result.segmented == result.without_foreground == 10
    assert all("there are no patches to cluster" in row["note"] for row in rows(store).values())


def test_a_set_that_cannot_be_fitted_does_not_stop_the_others(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    broken = scene(1)
    broken.features.descriptor[0, 0] = np.nan
    add_scenes(store, 1, animals(3) | {"bad/0.jpg": broken})
    with pytest.raises(JobError, match=r"1 of 3 sets could not be fitted \(bad: 1 of 48 descriptors hold.*others are"):
        run(store)
    assert {set_id for set_id, _ in rows(store)} == {"cat", "dog"}
    reports = sorted(Path(store.uri, "runs").iterdir())
    assert json.loads(reports[-1].read_text())["status"] == "failed"


def test_memory_that_holds_no_image_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store)
    monkeypatch.setattr(cosegment_tasks, "LEAST_TASK_MEMORY_BYTES", 0)
    monkeypatch.setattr(cosegment_tasks, "TASKS_SHARE_OF_RAY_MEMORY", 0)
    monkeypatch.setattr("pipelines.cosegment.worker.PATCHES_READ_AT_ONCE", 1)
    run(store, "spilled")
    in_memory = rows(store)
    for key, row in rows(store, "spilled").items():
        same = in_memory[key]
        assert all(row[name] == same[name] for name in ("mask_png", "foreground_png", "note", "set_version"))


def test_three_stages_and_one_part(store: Store, scenes: dict[str, Scene]) -> None:
    run(store, "three", "cosegment.three_stages=true")
    for (_, image_id), parts in patch_parts(store, "three").items():
        assert ((parts < 0) == (scenes[image_id].kinds > 1)).mean() > 0.97  # a part that is not common is background
    run(store, "one", "cosegment.num_parts=1")
    for row in rows(store, "one").values():
        np.testing.assert_array_equal(mask(row) * 255, mask(row, "foreground_png"))


def test_the_sample_is_spread_and_seeded() -> None:
    members = np.arange(10, 1010)
    chosen = cosegment_tasks.fit_sample(members, 100, seed=1)
    assert len(np.unique(chosen)) == 100
    np.testing.assert_array_equal((chosen - 10) // 10, np.arange(100))
    np.testing.assert_array_equal(chosen, cosegment_tasks.fit_sample(members, 100, seed=1))
    assert (chosen != cosegment_tasks.fit_sample(members, 100, seed=2)).any()
    np.testing.assert_array_equal(cosegment_tasks.fit_sample(members, 1000, seed=1), members)


def test_verify_finds_what_does_not_fit_together(store: Store) -> None:
    run(store)
    assert verify.run(settings(), store=store.uri).problems == []
    counted = stats.run(settings(), store=store.uri).results["parts"]["animals"]
    assert (counted["sets"], counted["images"], counted["files"]) == (2, 10, 2)  # one image has no label
    tables = PartTables.open_or_make(store.uri, "animals", {})
    (path,) = tables.patches.files()
    patches = tables.patches.read_file(path)
    less = tables.patches.write_file(path.replace("part-", "part-x"), patches.slice(1, len(patches) - GRID**2 - 1))
    rows = tables.images.read_file(path)
    shards = pa.array([less.path] * len(rows), pa.string())
    renamed = rows.set_column(rows.schema.get_field_index("shard"), "shard", shards)
    twice = pa.concat_tables([renamed, renamed.slice(3, 1)]).sort_by("image_id")
    commit_by_hand(tables.patches, [less], [path], "broken")
    commit_by_hand(tables.images, [tables.images.write_file(less.path, twice)], [path], "broken")
    problems = verify.run(settings(), store=store.uri).problems
    assert [one.removeprefix("parts/animals: ") for one in problems] == [
        "cat/03.jpg of set cat is there twice",
        "cat/00.jpg of set cat has 143 patches for a grid of 12 x 12",
        f"dog/04.jpg of set dog has no patches in {less.path}",
    ]
