"""report: what is chosen and read, and that the page shows what the tables say, whatever the store lacks."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hand_made import add_failure
from PIL import Image
from s3_server import BUCKET, S3Server
from set_scenes import PATCH_PIXELS, Scene, add_scenes
from shown_store import add_clusters, add_matches, add_parts, scenes, shown_store, spec
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from pipelines import report
from pipelines.cli import app
from pipelines.errors import JobError, RequestError
from pipelines.index import job as index
from pipelines.report.choose import Choice, choose
from pipelines.report.colours import KINDS, PARTS, amounts, rgb
from pipelines.report.contents import Contents, Results, read_contents
from pipelines.running.reports import RunReport
from pipelines.settings.loading import load_config
from pipelines.store import rows as few_rows
from pipelines.store.parquet import open_parquet
from pipelines.store.store import Store

NASTY = ["a/<img src=x onerror=alert(1)>.png", "a/<", "b/\"'&amp;.png", "b/</script><script>alert(2)</script>", "c.png"]
CATS = [f"cat/{number}.png" for number in range(4)]
DOGS = [f"dog/{number}.png" for number in range(4)]


class Parsed(HTMLParser):
    """Every tag with its attributes, and the text of every element that has an id."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self._ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if "id" in found:
            self._ids.append(found["id"])

    def handle_data(self, data: str) -> None:
        if self._ids:
            self.texts[self._ids[-1]] = self.texts.get(self._ids[-1], "") + data

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def contents_of(store: Store, *overrides: str, **asked: Any) -> Contents:
    config, results = load_config([], list(overrides)), Results.of(store)
    chosen = choice_of(store, *overrides, **asked)
    return read_contents(store, config, chosen, results)


def choice_of(
    store: Store, *overrides: str, sample: int | None = None, images: tuple[str, ...] = (), query: str | None = None
) -> Choice:
    results, settings = Results.of(store), load_config([], list(overrides)).report
    return choose(store, settings, sample, images, query, results.parts.values(), results.matches.values())


def drawn(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


@pytest.fixture(scope="module")
def made() -> dict[str, Scene]:
    return scenes([*CATS, *DOGS])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, made: dict[str, Scene]) -> Store:
    """A store with a result of every kind but an index."""
    store = shown_store(tmp_path_factory.mktemp("full"), made)
    add_clusters(store, made)
    add_parts(store, made, note="odd")
    add_matches(store, {(CATS[0], CATS[1]): [0.9, 0.8], (CATS[0], DOGS[0]): [0.7], (CATS[2], DOGS[1]): []})
    return store


# Choosing


def test_a_sample_is_always_the_same_and_has_several_of_a_label(tmp_path: Path) -> None:
    store = shown_store(tmp_path, scenes([f"{label}/{number}.png" for label in "abcdefgh" for number in range(6)]))
    ids = choice_of(store, sample=8).image_ids
    assert ids == choice_of(store, sample=8).image_ids and ids == sorted(ids) and len(ids) == 8
    assert len({one[0] for one in ids}) == 2, "four each of two labels, and not eight labels with one image each"
    assert choice_of(store, "report.seed=1", sample=8).image_ids != ids
    assert len(choice_of(store).image_ids) == 48 and len(choice_of(store, "report.most_images=5").image_ids) == 5


def test_a_sample_has_pairs_that_were_matched(full: Store) -> None:
    for seed in range(5):
        ids = choice_of(full, f"report.seed={seed}", sample=4).image_ids
        assert any(set(pair) <= set(ids) for pair in [(CATS[0], CATS[1]), (CATS[0], DOGS[0]), (CATS[2], DOGS[1])])


def test_images_are_chosen_by_name_or_by_a_file(full: Store, tmp_path: Path) -> None:
    assert choice_of(full, images=(DOGS[1], CATS[0], DOGS[1])).image_ids == [DOGS[1], CATS[0]], "as given, once"
    listed = tmp_path / "some.csv"
    listed.write_text(f"image_id\n{CATS[3]}\n{DOGS[2]}\n")
    assert choice_of(full, images=(str(listed),)).image_ids == [CATS[3], DOGS[2]]


def test_images_are_chosen_by_a_query(full: Store) -> None:
    query = "SELECT image_id FROM images WHERE label = 'dog' ORDER BY image_id DESC LIMIT 2"
    assert choice_of(full, query=query).image_ids == [DOGS[3], DOGS[2]]
    tables = "SELECT p.image_id FROM parts_things_images AS p JOIN clusters_words_assignments USING (image_id)"
    assert len(choice_of(full, query=tables, sample=3).image_ids) == 3
    assert set(choice_of(full, query="SELECT image_a AS image_id FROM matches_nearest_matches").image_ids) == {CATS[0]}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"images": ("cat/0.png", "cat/9.png")}, r"1 of the images .* \(cat/9.png\); an id that it has is (cat|dog)/"),
        ({"images": ("a",), "query": "SELECT 1"}, "both choose images"),
        ({"query": "SELECT label FROM images"}, "gives label, but a column image_id"),
        ({"query": "SELECT image_id FROM imagse"}, "cannot be run .* The tables are images, patches"),
        ({"query": "SELECT image_id FROM images WHERE false"}, "finds no image"),
        ({"images": ("nowhere.csv",)}, "does not exist"),
    ],
)
def test_a_wrong_choice_is_one_sentence(full: Store, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        choice_of(full, **asked)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT content AS image_id FROM read_text('{secret}')", "Permission"),
        ("SELECT filename AS image_id FROM read_text('{folder}/*')", "Permission"),
        ("SELECT file AS image_id FROM glob('{folder}/*')", "Permission"),
        ("SELECT image_id FROM '{secret}'", "cannot be run"),
        ("COPY images TO '{written}'", "one SELECT, but COPY"),
        ("SELECT image_id FROM images; COPY images TO '{written}'", "one SELECT, but SELECT and COPY"),
        ("SELECT image_id FROM images; SELECT 1", "one SELECT, but SELECT and SELECT"),
        ("SET enable_external_access = true", "one SELECT, but SET"),
        ("ATTACH '{written}'", "one SELECT, but ATTACH"),
        ("INSTALL httpfs", "one SELECT, but LOAD"),
        (";", "one SELECT, but nothing"),
    ],
)
def test_a_query_sees_the_tables_and_nothing_else(full: Store, tmp_path: Path, query: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    secret, written = tmp_path / "folder" / "secret.csv", tmp_path / "written"
    secret.write_text("image_id\nnobody should see this\n")
    with pytest.raises(RequestError, match=says) as caught:
        choice_of(full, query=query.format(secret=secret, folder=secret.parent, written=written))

    assert "nobody should see this" not in str(caught.value) and not written.exists()


def test_a_query_of_empty_tables_runs(full: Store) -> None:
    assert full.failures.files() == {}
    assert choice_of(full, query="SELECT image_id FROM images ANTI JOIN failures USING (image_id) LIMIT 1").image_ids


def test_a_query_reads_no_file_outside_that_a_log_names(tmp_path: Path) -> None:
    store = shown_store(tmp_path, scenes(["a/0.png"]))
    (inside,) = store.images.files()
    outside = tmp_path / "outside.parquet"
    shutil.copy(Path(store.images.uri, inside), outside)
    for log in Path(store.images.uri, "_delta_log").glob("*.json"):
        log.write_text(log.read_text().replace(inside, os.path.relpath(outside, store.images.uri)))
    with pytest.raises(JobError, match="lies outside"):
        choice_of(Store.open(store.uri, store.config), query="SELECT image_id FROM images")


def test_only_files_of_the_images_shown_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = shown_store(tmp_path, scenes(["a/0.png", "a/1.png"]))
    add_scenes(store, 2, scenes(["b/0.png"], 2), tmp_path / "pictures")
    add_scenes(store, 3, scenes(["c/0.png"], 3), tmp_path / "pictures")
    store.refresh()
    opened: list[tuple[str, tuple[str, ...]]] = []

    class Watched:
        def __init__(self, parquet: Any, uri: str) -> None:
            self.parquet, self.uri = parquet, uri

        def __getattr__(self, name: str) -> Any:
            return getattr(self.parquet, name)

        def read_row_group(self, group: int, columns: list[str]) -> Any:
            opened.append((self.uri, tuple(columns)))
            return self.parquet.read_row_group(group, columns=columns)

    @contextmanager
    def watched(uri: str, options: Any) -> Iterator[Watched]:
        with open_parquet(uri, options) as parquet:
            yield Watched(parquet, uri)

    monkeypatch.setattr(few_rows, "open_parquet", watched)
    found = contents_of(store, images=("b/0.png",))
    assert [one.image_id for one in found.images] == ["b/0.png"]
    assert len(opened) == 2 and "/images/" in opened[0][0] and "/patches/" in opened[1][0]
    assert "run_id" not in opened[0][1]


def test_rows_of_a_large_table_are_a_sample(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "MOST_SAMPLED_ROWS_PER_FILE", 3)
    rows = few_rows.some_rows(full.images, ["image_id"], seed=0)["image_id"].to_pylist()
    assert len(rows) == 3 and rows == few_rows.some_rows(full.images, ["image_id"], seed=0)["image_id"].to_pylist()


# What is shown


def test_layers_show_what_the_tables_say(full: Store, made: dict[str, Scene]) -> None:
    found = contents_of(full)
    layers = {layer.title: layer for layer in found.layers}
    assert list(layers) == [
        *("Descriptors as colours", "Saliency", "Foreground: things", "Parts: things", "Clusters: words")
    ]
    ranked = found.clusterings[0].ranked
    counts = np.bincount(np.concatenate([one.kinds.reshape(-1) for one in made.values()]))
    assert [int(counts[cluster]) for cluster in ranked] == sorted(counts.tolist(), reverse=True)
    side = float(12 * PATCH_PIXELS)
    for image_id, one in made.items():
        saliency = layers["Saliency"].overlays[image_id]
        np.testing.assert_array_equal(drawn(saliency.png)[..., :3], amounts(one.features.saliency))
        assert saliency.place == pytest.approx((0, 0, side, side))
        colours = np.array([rgb(KINDS[ranked.index(kind)]) for kind in range(4)])
        np.testing.assert_array_equal(
            drawn(layers["Clusters: words"].overlays[image_id].png)[..., :3], colours[one.kinds]
        )
        pixels = one.kinds.repeat(PATCH_PIXELS, 0).repeat(PATCH_PIXELS, 1)
        parts = drawn(layers["Parts: things"].overlays[image_id].png)
        np.testing.assert_array_equal(parts[..., 3] > 0, pixels < 2)
        for part in (0, 1):
            assert (parts[pixels == part][:, :3] == rgb(PARTS[part])).all()
        shade = drawn(layers["Foreground: things"].overlays[image_id].png)
        np.testing.assert_array_equal(shade[..., 3] == 0, pixels < 2)
        assert layers["Parts: things"].notes[image_id] == "odd"
    per_cent = [float(text.split(": ")[1].rstrip("%")) for _, text in layers["Clusters: words"].kinds]
    np.testing.assert_allclose(per_cent, 100 * np.sort(counts)[::-1] / counts.sum(), atol=0.51)


def test_colours_are_principal_components_of_all_photos_together(full: Store, made: dict[str, Scene]) -> None:
    layer = next(layer for layer in contents_of(full).layers if layer.key == "descriptors")
    colours = np.concatenate([drawn(layer.overlays[one].png)[..., :3].reshape(-1, 3) for one in made]).astype(float)
    rows = np.concatenate([one.features.descriptor.reshape(-1, 8) for one in made.values()])
    components = PCA(4).fit_transform(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    for channel in range(3):
        inside = (colours[:, channel] > 0) & (colours[:, channel] < 255)
        assert inside.mean() > 0.9, "a few are too bright or too dark to tell"
        related = np.corrcoef(colours[inside, channel], components[inside, channel + 1])[0, 1]
        assert abs(related) > 0.999, "one rule for all photos"


def test_typical_patches_are_nearest_to_their_centroid_and_cut_where_they_are(
    full: Store, made: dict[str, Scene]
) -> None:
    found = contents_of(full)
    clustering = found.clusterings[0]
    for kind in range(4):
        everywhere = [
            ((row * 12 + col) / 144, image_id, row, col)
            for image_id, one in made.items()
            for row, col in np.argwhere(one.kinds == kind).tolist()
        ]
        typical = clustering.typical[kind]
        assert len(typical) == 8 and max([one.image_id for one in typical].count(one) for one in made) <= 2
        assert typical[0].distance == pytest.approx(min(everywhere)[0])
        for one in typical:
            assert one.row is not None and one.col is not None
            assert made[one.image_id].kinds[one.row, one.col] == kind
            crop = found.crops[one.image_id, one.row, one.col]
            x, y, width, height = crop.mark
            middle = np.asarray(Image.open(io.BytesIO(crop.jpeg)), float)[int(y + height / 2), int(x + width / 2)]
            picture = np.asarray(made[one.image_id].picture, float)
            right = picture[one.row * PATCH_PIXELS + PATCH_PIXELS // 2, one.col * PATCH_PIXELS + PATCH_PIXELS // 2]
            assert np.abs(middle - right).max() < 40, "a crop shows its patch in the frame"


def test_matches_join_the_places_that_the_table_says(full: Store) -> None:
    found = contents_of(full)
    pairs = {(pair.image_a, pair.image_b): pair for pair in found.pairs["nearest"]}
    assert list(pairs) == [(CATS[0], CATS[1]), (CATS[0], DOGS[0])], "pairs without matches are not drawn"
    second = pairs[CATS[0], CATS[1]].matches[1]
    places = (second.y_a, second.x_a, second.y_b, second.x_b)
    assert places == (1.5 * PATCH_PIXELS, 2.5 * PATCH_PIXELS, 3.5 * PATCH_PIXELS, 4.5 * PATCH_PIXELS)
    assert second.similarity == pytest.approx(0.8) and pairs[CATS[0], CATS[1]].score == pytest.approx(0.75)
    assert contents_of(full, images=(CATS[0], DOGS[0])).pairs["nearest"][0].image_b == DOGS[0]
    assert contents_of(full, images=(CATS[1], DOGS[0])).pairs["nearest"] == []


def test_nearest_photos_are_those_of_brute_force(full: Store, made: dict[str, Scene]) -> None:
    found = contents_of(full).neighbours
    assert len(found) == 1 and "shown here" in found[0].where and len(found[0].found) == 8
    ids = sorted(made)
    vectors = np.stack([made[one].features.embedding for one in ids]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for image_id, nearest in found[0].found.items():
        similarity = vectors @ vectors[ids.index(image_id)]
        order = [ids[at] for at in np.argsort(-similarity) if ids[at] != image_id][:6]
        assert [other for other, _ in nearest] == order
        np.testing.assert_allclose([value for _, value in nearest], sorted(similarity)[::-1][1:7], atol=1e-5)


def test_an_index_is_searched_beyond_the_photos_shown(tmp_path: Path, made: dict[str, Scene]) -> None:
    store = shown_store(tmp_path, made)
    index.run(load_config(), store=store.uri, name="photos")
    found = contents_of(store, images=(CATS[0], DOGS[0]))
    assert "all 8 images" in found.neighbours[0].where
    nearest = dict(found.neighbours[0].found[CATS[0]])
    assert len(nearest) == 6 and CATS[0] not in nearest
    assert set(found.others) == {one for pairs in found.neighbours[0].found.values() for one, _ in pairs} - {
        *(CATS[0], DOGS[0])
    }
    assert all(one.photo.jpeg for one in found.others.values())


def test_the_live_view_has_every_patch_and_finds_its_kind(full: Store, made: dict[str, Scene]) -> None:
    live = contents_of(full).live
    assert live is not None and live.codes.shape == (8 * 144, 8) and live.agreement is not None
    assert (
        live.agreement > 0.5
        and live.one_off >= live.agreement
        and 0 <= live.loss < 0.01
        and live.kept == pytest.approx(1)
    )
    assert 0 <= live.low < live.high <= 1
    image, row, column = live.start
    assert made[live.image_ids[image]].kinds[row, column] < 2, "it begins with a patch of the object"


def test_a_fine_grid_is_thinned_and_stays_where_it_was(tmp_path: Path) -> None:
    made = scenes(["a/0.png"], size=12)
    found = contents_of(shown_store(tmp_path, made), "report.most_patches=20")
    assert found.live is not None and found.live.grids == [(4, 4)] and found.step == 3
    assert found.places["a/0.png"] == pytest.approx((0, 0, 72, 72))
    kinds = made["a/0.png"].kinds[1::3, 1::3].reshape(-1)
    one_kind = found.live.codes[kinds == 2].astype(float)
    unit = one_kind / np.linalg.norm(one_kind, axis=1, keepdims=True)
    assert (unit @ unit.T).min() > 0.8, "these are the descriptors of the patches in the middle of three by three"


def test_photos_that_are_gone_or_changed_are_grey_and_say_why(tmp_path: Path, made: dict[str, Scene]) -> None:
    store = shown_store(tmp_path, made)
    add_clusters(store, made)
    pictures = {row["image_id"]: row["uri"] for row in store.images.read(["image_id", "uri"]).to_pylist()}
    Path(pictures[CATS[0]]).unlink()
    Path(pictures[CATS[1]]).write_bytes(b"no picture")
    Image.new("RGB", (5, 5)).save(pictures[CATS[2]])
    found = contents_of(store)
    reasons = {one.image_id: one.photo.reason for one in found.images if one.photo.jpeg is None}
    assert reasons.keys() == set(CATS[:3]) and found.without_photo == 3
    assert "no longer" in reasons[CATS[0]] and "cannot be used" in reasons[CATS[1]] and "changed" in reasons[CATS[2]]
    result = report.run(load_config(), store=store.uri)
    html = unescape(Path(result.output).read_text())
    assert result.without_photo == 3 and all(reason in html for reason in reasons.values())


def test_photos_inside_tars_are_shown(tmp_path: Path) -> None:
    made = scenes(["a.tar/0.png", "a.tar/1.png"])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for image_id, one in made.items():
            one.picture.save(tmp_path / "one.png")
            tar.add(tmp_path / "one.png", image_id.removeprefix("a.tar/"))
    store = Store.create(str(tmp_path / "store"), spec())
    add_scenes(store, 1, made, uris={image_id: f"{tmp_path}/{image_id}" for image_id in made})
    store.refresh()
    assert [one.photo.reason for one in contents_of(store).images] == ["", ""]


@pytest.mark.parametrize(
    ("overrides", "live"),
    [
        (("store.patches=none",), False),
        (("store.patches=salient", "store.salient_threshold=0.1"), True),
        (("store.every=3",), True),
        (("store.dtype=int8",), True),
        (("features.saliency=false", "features.embedding=false"), True),
    ],
)
def test_stores_that_lack_something(tmp_path: Path, made: dict[str, Scene], overrides: tuple[str], live: bool) -> None:
    store = shown_store(tmp_path, made, *overrides)
    found = contents_of(store)
    assert (found.live is not None) == live and len(found.images) == 8
    if "store.every=3" in overrides:
        assert found.live is not None and (found.live.codes.any(axis=1) == (np.arange(8 * 144) % 144 % 3 == 0)).all()
    assert report.run(load_config(), store=store.uri).bytes > 10_000


def test_failures_and_runs_are_told(tmp_path: Path, made: dict[str, Scene]) -> None:
    store = shown_store(tmp_path, made)
    for number in range(3):
        add_failure(store, "20260101T000000Z-00000f", f"x/{number}.png", "TruncatedError")
    add_failure(store, "20260101T000000Z-00000f", "y.png", "BombError")
    seconds = {"total": 4.0}
    for number in range(14):
        run = RunReport("extract", store.uri, spec(), f"202601{number + 1:02}T000000Z-000000", {})
        run.finish("done", result={"extracted": number, "images_per_second": 10.0 * number, "seconds": seconds})
    for number, what in enumerate(("train", "update")):
        run = RunReport("cluster", store.uri, spec(), f"202602{number + 1:02}T000000Z-000000", {})
        run.finish("done", result={"what": what, "added": 3 * number, "vectors": 500, "seconds": seconds})
    store.refresh()
    found = contents_of(store).glance
    assert [run.done for run in found.runs[:2]] == [3, 500], "images of an update, vectors of a training"
    assert [(error, count) for _, error, _, count in found.failures] == [("TruncatedError", 3), ("BombError", 1)]
    assert (found.images, found.failed, found.labels) == (8, 4, [("cat", 4), ("dog", 4)])
    assert [run.done for run in found.runs[2:]] == list(range(13, 3, -1)), "the latest first, no more than fit"
    assert found.runs[2].per_second == 130 and found.fastest == 130 and found.runs[2].seconds == 4


def test_a_store_in_a_bucket(s3: S3Server, tmp_path: Path, made: dict[str, Scene]) -> None:
    options = f"storage.options={json.dumps(s3.options)}"
    store = Store.create(f"s3://{BUCKET}/report/store", spec(options))
    add_scenes(store, 1, made, tmp_path)
    add_scenes(store, 2, scenes(["other/0.png"]), tmp_path)
    query = "SELECT image_id FROM images JOIN patches USING (image_id) WHERE label = 'cat' AND row = 0"
    result = report.run(load_config([], [options]), store=store.uri, query=query)
    assert result.images == 4 and result.without_photo == 0
    html = s3_file(s3, f"{BUCKET}/report/store/report.html").decode()
    assert CATS[0] in html and DOGS[0] not in html and s3.options["secret"] not in html


def s3_file(s3: S3Server, path: str) -> bytes:
    return fsspec.filesystem("s3", **s3.options).cat_file(path)


# The page


def test_the_page_reaches_for_nothing_and_names_are_text(tmp_path: Path) -> None:
    made = scenes(NASTY)
    store = shown_store(tmp_path, made)
    add_clusters(store, made)
    add_matches(store, {(NASTY[1], NASTY[2]): [0.9]})
    result = report.run(load_config(), store=store.uri, output=str(tmp_path / "out" / "page.html"))
    html = Path(result.output).read_text()
    page = Parsed(html)
    assert len(page.named("script")) == 2 and not page.named("img") and not page.named("link")
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), attributes
        assert not any(name.startswith("on") for name in attributes) and "style" not in attributes
    policy = next(meta["content"] for meta in page.named("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    data = json.loads(page.texts["live-data"])
    assert sorted(one["id"] for one in data["images"]) == sorted(NASTY)
    assert {one["aria-label"] for _, one in page.tags if one.get("role") == "application"} == set(NASTY)
    assert result.bytes == len(html.encode()) < 400_000


def test_the_command_says_what_it_wrote(full: Store, tmp_path: Path) -> None:
    runner, target = CliRunner(), tmp_path / "page.html"
    planned = runner.invoke(app, ["report", full.uri, "-o", str(target), "--dry-run"])
    assert planned.exit_code == 0 and "would show 8 images" in planned.stdout and not target.exists()
    done = runner.invoke(
        app, ["report", full.uri, "-o", str(target), "--json", "--images", CATS[0], "--images", DOGS[0]]
    )
    told = json.loads(done.stdout)
    assert (told["status"], told["images"], told["output"]) == ("done", 2, str(target))
    assert told["bytes"] == target.stat().st_size and told["sections"][1] == "Point and see"
    inside = runner.invoke(app, ["report", full.uri])
    assert f"{full.uri}/report.html" in inside.stdout and Path(full.uri, "report.html").exists()
    Path(full.uri, "report.html").unlink()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-o", "page.pdf"], "give a name such as report.html"),
        (["--set", "report.descriptor=descriptor_key3"], "the store's patches have descriptor"),
        (["--set", "report.photo_side=2"], "report.photo_side"),
        (["--images", "nothing.png"], "not in the store"),
    ],
)
def test_a_wrong_request_is_one_sentence(full: Store, options: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["report", full.uri, *options])
    assert done.exit_code == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_an_empty_store_says_how_to_fill_it(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"), spec())
    with pytest.raises(RequestError, match="has no images yet: run `dinoray extract"):
        report.run(load_config(), store=store.uri)


def test_plots_are_files_with_the_colours_of_the_page(full: Store, made: dict[str, Scene], tmp_path: Path) -> None:
    page, folder = str(tmp_path / "r.html"), tmp_path / "png"
    result = report.run(load_config(), store=full.uri, output=page, images=[CATS[0], CATS[1]], png=str(folder))
    names = sorted(file.name for file in folder.iterdir())
    assert names == [
        *("clusters-words-members.png", "clusters-words.png", "descriptors-as-colours.png", "foreground-things.png"),
        *("matches-nearest-01.png", "nearest-1.png", "parts-things.png", "photos.png", "saliency.png"),
        "similarity.png",
    ]
    assert sorted(result.plots) == [str(folder / name) for name in names]
    photos, clusters = (np.asarray(Image.open(folder / name), float) for name in ("photos.png", "clusters-words.png"))
    ranked = contents_of(full, images=(CATS[0], CATS[1])).clusterings[0].ranked
    kinds = made[CATS[0]].kinds
    for row, col in ((0, 0), (11, 11), tuple(np.argwhere(kinds == 0)[0]), tuple(np.argwhere(kinds == 1)[0])):
        at = (round(8 + (row + 0.5) * 200 / 12), round(8 + (col + 0.5) * 200 / 12))
        right = 0.25 * photos[at] + 0.75 * np.array(rgb(KINDS[ranked.index(kinds[row, col])]))
        assert np.abs(clusters[8 + at[0], 8 + at[1]] - right).max() < 25, "the sheet lies in a frame with its legend"
