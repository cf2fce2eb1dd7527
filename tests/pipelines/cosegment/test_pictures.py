"""Masks refined along the edges of pictures: wherever those lie, turned, gone, changed; files and overlays of masks."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from local_ray import use_local_ray
from PIL import Image
from set_scenes import PATCH_PIXELS, add_scenes, scene
from small_runs import as_options, settings
from typer.testing import CliRunner

from dino_ops import Extractor
from dino_ops.cosegmentation import fit_foreground, foreground_patches
from dino_ops.images import ImageSpec
from dino_ops.mask_refinement import grabcut
from dino_ops.parts import fit_parts, smooth_parts
from pipelines import sources
from pipelines.cli import app
from pipelines.cosegment import job as cosegment
from pipelines.cosegment.export import draw_overlay, file_names
from pipelines.cosegment.masks import SetImage, to_original
from pipelines.cosegment.spill import SpilledArrays
from pipelines.errors import RequestError
from pipelines.extract.shards import ShardWriter
from pipelines.features.same_features import spec_with_weights
from pipelines.settings.loading import load_config
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.patches import ImagePlace
from pipelines.store.store import Store

REFINED = ("cosegment.num_parts=2", "cosegment.sample_interval=3", "cosegment.sets=directory")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_ray(monkeypatch, cosegment)


def new_store(folder: Path) -> Store:
    spec = ("model.name=vit_tiny_patch16_224", "model.weights=random", "image.native=true", "store.dtype=float32")
    return Store.create(str(folder), load_config([], list(spec)))


def run(store: Store, *overrides: str, **options: Any) -> cosegment.Result:
    return cosegment.run(settings(*REFINED, *overrides), store=store.uri, name="things", **options)


def masks(store: Store) -> dict[str, dict[str, Any]]:
    """image_id -> note, parts and foreground."""
    rows = DeltaTable(f"{store.uri}/parts/things/images").to_pyarrow_table().to_pylist()
    return {
        row["image_id"]: {
            "note": row["note"],
            "parts": np.asarray(Image.open(io.BytesIO(row["mask_png"]))),
            "foreground": np.asarray(Image.open(io.BytesIO(row["foreground_png"]))) > 0,
        }
        for row in rows
    }


def pixels(kinds: np.ndarray) -> np.ndarray:
    return kinds.repeat(PATCH_PIXELS, 0).repeat(PATCH_PIXELS, 1)


def test_masks_are_those_of_the_operations_on_arrays(tmp_path: Path) -> None:
    """The foreground of GrabCut and the parts of the dense CRF, on the picture that the model saw."""
    store = new_store(tmp_path / "store")
    scenes = {f"set/{number}.png": scene(number) for number in range(4)}
    add_scenes(store, 1, scenes, tmp_path)
    assert run(store).noted == 0
    descriptors = [one.features.descriptor for one in scenes.values()]
    saliency = [one.features.saliency for one in scenes.values()]
    foreground = fit_foreground(descriptors, saliency, sample_interval=3)
    parts = fit_parts(foreground, descriptors, num_parts=2, sample_interval=3)
    patches = DeltaTable(f"{store.uri}/parts/things/patches").to_pyarrow_table()
    for name, found in masks(store).items():
        one = scenes[name]
        rgb = np.asarray(one.picture)
        cut = grabcut(foreground_patches(foreground, one.features.descriptor), rgb)
        assert cut.refined
        np.testing.assert_array_equal(found["foreground"], cut.mask)
        smooth = smooth_parts(parts, one.features.descriptor, rgb)
        np.testing.assert_array_equal(found["parts"].astype(int) - 1, smooth)
        assert (found["parts"] > 0)[::PATCH_PIXELS, ::PATCH_PIXELS].sum() > 0
        of_image = patches.filter(pc.equal(patches["image_id"], name))
        of_image = of_image.sort_by([("row", "ascending"), ("col", "ascending")])
        np.testing.assert_array_equal(of_image["part_id"].to_numpy(), smooth[::PATCH_PIXELS, ::PATCH_PIXELS].ravel())


def test_pictures_that_cannot_be_had_leave_masks_in_steps_of_patches(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    scenes = {f"set/{number}.png": scene(number) for number in range(6)}
    add_scenes(store, 1, scenes, tmp_path)
    files = sorted(tmp_path.glob("1-*.png"))
    files[0].unlink()
    files[1].write_bytes(b"x" * files[1].stat().st_size)
    files[2].write_bytes(b"longer than it was" + files[2].read_bytes())
    result = run(store)
    assert (result.status, result.segmented, result.noted) == ("done", 6, 3)
    found = masks(store)
    said = ["its picture cannot be read", "its picture cannot be used", "the file changed"]
    for number, words in enumerate(said):
        name = f"set/{number}.png"
        assert found[name]["note"].startswith("not refined: ") and words in found[name]["note"]
        np.testing.assert_array_equal(found[name]["foreground"], pixels(scenes[name].kinds) < 2)
        np.testing.assert_array_equal(found[name]["parts"] > 0, pixels(scenes[name].kinds) < 2)
    assert all(found[f"set/{number}.png"]["note"] is None for number in (3, 4, 5))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_pictures_inside_containers(tmp_path: Path, kind: str) -> None:
    """Are found by the uri in the images table, and give the masks of loose files."""
    scenes = {f"set/{number}.png": scene(number) for number in range(3)}
    loose, packed = new_store(tmp_path / "loose"), new_store(tmp_path / "packed")
    add_scenes(loose, 1, scenes, tmp_path)
    data = {name: (tmp_path / f"1-{at}.png").read_bytes() for at, name in enumerate(sorted(scenes))}
    if kind == "tar":
        container = tmp_path / "shard.tar"
        with tarfile.open(container, "w") as archive:
            for name, content in data.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        container = tmp_path / "data.parquet"
        pq.write_table(pa.table({"image": list(data.values()), "id": list(data)}), container, row_group_size=2)
    listed = sources.list_images(str(container)).table.to_pylist()
    writer = ShardWriter(packed.uri, packed.config, "20200101T000000Z-000001")
    for at, row in enumerate(listed):
        name = row["image_id"].removeprefix("shard.tar/")
        writer.add({**row, "image_id": name, "position": at}, scenes[name].features)
    patches, images = writer.close()
    versions = {
        name: (row["source_size"], row["source_version"]) for name, row in zip(sorted(data), listed, strict=True)
    }
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    Committer(packed, "20200101T000000Z-000001", set()).commit([report], versions)
    assert run(loose).noted == run(packed).noted == 0
    expected, found = masks(loose), masks(packed)
    for name in scenes:
        np.testing.assert_array_equal(found[name]["parts"], expected[name]["parts"])
    container.write_bytes(container.read_bytes() + b"\0" * 10240)  # it is another file now
    again = cosegment.run(settings(*REFINED), store=packed.uri, name="again")
    assert again.noted == 3


def test_masks_have_the_size_of_the_original(tmp_path: Path) -> None:
    """Resized, cropped to patches, and turned by EXIF: extracted as users do, pictures 3 x 2 in both directions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(150, 101), (101, 150), (150, 101)]):
        noise = Image.fromarray(generator.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((width, height))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1  # turned by 90 degrees
        noise.save(folder / f"{number}.jpg", exif=exif)
    spec = load_config([], ["model.name=vit_tiny_patch16_224", "model.weights=random", "image.shorter_side=40",
                            "image.crop=patch", "model.device=cpu"])  # fmt: skip
    store = Store.create(str(tmp_path / "store"), spec)
    extractor = Extractor("vit_tiny_patch16_224", "random", shorter_side=40, crop="patch", device="cpu")
    writer, versions = ShardWriter(store.uri, store.config, "20200101T000000Z-000001"), {}
    for at, row in enumerate(sources.list_images(str(folder)).table.to_pylist()):
        writer.add({**row, "position": at}, extractor(Path(row["uri"])))
        versions[row["image_id"]] = (row["source_size"], row["source_version"])
    patches, images = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    Committer(store, "20200101T000000Z-000001", set()).commit([report], versions)
    result = run(store, "cosegment.saliency_threshold=0", "cosegment.votes_percentage=1", "cosegment.sample_interval=1")
    assert result.segmented == 3
    found = masks(store)
    shapes = {"0.jpg": (101, 150), "1.jpg": (150, 101), "2.jpg": (150, 101)}
    for name, shape in shapes.items():
        assert found[name]["parts"].shape == found[name]["foreground"].shape == shape
        assert "not refined: its picture" not in (found[name]["note"] or "")
    # 40 x 59 pixels were cut to 32 x 48: what the model never saw is background
    for name in shapes:
        assert not found[name]["foreground"][
            round(shapes[name][0] * (32 / 40 if name == "0.jpg" else 48 / 59)) + 1 :
        ].any()


def test_a_crop_covers_its_part_of_the_original() -> None:
    image = SetImage(ImagePlace("a", "f", (2, 3)), "r", width=150, height=101, model_width=48, model_height=32)
    spec = ImageSpec(shorter_side=40, crop="patch")
    whole = to_original(np.ones((32, 48), bool), image, spec, False)
    assert whole.shape == (101, 150)
    rows, columns = whole.any(axis=1), whole.any(axis=0)
    assert (rows.sum(), columns.sum()) == (round(101 * 32 / 40), round(150 * 48 / 59))
    assert rows[0] and columns[0] and not rows[-1] and not columns[-1]


def test_crops_join_the_fit(tmp_path: Path) -> None:
    """With the store's own weights; they never vote, and the images' masks keep their number."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        scene(number).picture.save(folder / f"{number}.png")
    spec = load_config([], ["model.name=vit_tiny_patch16_224", "model.weights=random", "image.shorter_side=48",
                            "model.device=cpu"])  # fmt: skip
    store = Store.create(str(tmp_path / "store"), spec)
    extractor = Extractor("vit_tiny_patch16_224", "random", shorter_side=48, device="cpu")
    writer, versions = ShardWriter(store.uri, store.config, "20200101T000000Z-000001"), {}
    for at, row in enumerate(sources.list_images(str(folder)).table.to_pylist()):
        writer.add({**row, "position": at}, extractor(Path(row["uri"])))
        versions[row["image_id"]] = (row["source_size"], row["source_version"])
    patches, images = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    Committer(store, "20200101T000000Z-000001", set()).commit([report], versions)
    seen = []
    from pipelines.cosegment import worker as cosegment_worker

    fit = cosegment_worker.fit_foreground
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            cosegment_worker, "fit_foreground", lambda *args, **kw: seen.append(args[:2]) or fit(*args, **kw)
        )
        result = run(store, "cosegment.crop_augmentations=3", "cosegment.three_stages=true", "model.device=cpu")
        assert result.segmented == 2
        saliency = seen[0][1]
        assert len(saliency) == 2 + 2 * 2 * 3 and [one is None for one in saliency] == [False] * 2 + [True] * 12
    other = load_config([], ["model.weights=pretrained", *REFINED, "cosegment.crop_augmentations=3"])
    assert cosegment.run(other, store=store.uri, name="other", dry_run=True).pending == 2  # the store's are random
    trained = Store.create(str(tmp_path / "trained"), spec)
    trained.spec["model"]["weights"] = "sha256:0123"
    with pytest.raises(RequestError, match=r"needs the model.*--set model.weights=FILE"):
        spec_with_weights(trained, other, "cosegment.crop_augmentations")


HOSTILE = [
    *("../../up.png", "/etc/abs.png", "a/../b.png", "qu\"ote's.png", "line\nbreak.png", "x/./y.png", "..", "C:\\d.png"),
    *("a" * 300 + ".png", "plain/photo.jpg", "plain/photo.png", "no ending", "s3://bucket/key.png"),
]


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    add_scenes(store, 1, {name: scene(at) for at, name in enumerate(HOSTILE)}, tmp_path)
    sets = tmp_path / "sets.parquet"
    pq.write_table(pa.table({"image_id": HOSTILE, "set_id": ["../../set", *(["one"] * (len(HOSTILE) - 1))]}), sets)
    before = {path for path in tmp_path.rglob("*") if "store" not in path.parts}
    out = tmp_path / "out"
    result = run(store, "cosegment.refine=false", sets=str(sets), masks=str(out / "m"), overlays=str(out / "o"))
    assert result.exported == 3 * len(HOSTILE)
    after = {
        path for path in tmp_path.rglob("*") if "store" not in path.parts and path != out and out not in path.parents
    }
    assert after == before
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) == 3 * len(HOSTILE) and all(path.suffix == ".png" for path in files)
    assert (out / "m" / "parts" / "one" / "plain" / "photo.jpg.png").exists()


def test_file_names_are_those_of_the_images_where_they_can_be() -> None:
    names = file_names([*HOSTILE, "cow/1.jpg", "cow/2.JPEG", "x.jpg", "x.png", "x.jpg.png"])
    assert len({*names.values()}) == len(names)
    assert names["cow/1.jpg"] == "cow/1" and names["cow/2.JPEG"] == "cow/2"
    assert (names["plain/photo.jpg"], names["plain/photo.png"]) == ("plain/photo.jpg", "plain/photo.png")
    assert names["no ending"] == "no ending"
    for name in names.values():
        assert not {"", ".", ".."} & {*name.split("/")} and name.isprintable() and ":" not in name and "\\" not in name


def test_files_of_masks_are_the_tables_masks(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    add_scenes(store, 1, {f"set/{number}.png": scene(number) for number in range(2)}, tmp_path)
    assert run(store).exported == 0
    (tmp_path / "1-1.png").unlink()
    again = run(store, masks=str(tmp_path / "m"), overlays=str(tmp_path / "o"))  # of what was done before
    assert (again.segmented, again.exported) == (0, 6)
    for name, found in masks(store).items():
        file = Path(name).with_suffix(".png")
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "m" / "parts" / file)), found["parts"])
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "m" / "foreground" / file)), 255 * found["foreground"]
        )
        assert Image.open(tmp_path / "o" / file).size == found["parts"].shape[::-1]


def test_an_overlay_keeps_the_background_and_colours_parts() -> None:
    one = scene(1)
    picture = io.BytesIO()
    one.picture.save(picture, "PNG")
    kinds = pixels(one.kinds)
    parts = np.where(kinds < 2, kinds + 1, 0).astype(np.uint8)
    drawn = np.asarray(Image.open(io.BytesIO(draw_overlay(picture.getvalue(), parts, parts))))
    rgb = np.asarray(one.picture)
    np.testing.assert_array_equal(drawn[kinds > 1], rgb[kinds > 1])
    inner = kinds == 0
    inner[:, 1:-1] &= (parts[:, :-2] > 0) & (parts[:, 2:] > 0)
    inner[1:-1] &= (parts[:-2] > 0) & (parts[2:] > 0)
    assert len(np.unique(drawn[inner], axis=0)) == 1 and (drawn[inner][0] != rgb[inner][0]).any()
    grey = np.asarray(Image.open(io.BytesIO(draw_overlay(None, parts * 0, parts * 0))))
    assert (grey == 127).all()
    assert (
        Image.open(io.BytesIO(draw_overlay(b"no image", np.zeros((3000, 10), np.uint8), np.zeros((3000, 10))))).height
        == 1024
    )


def test_arrays_beyond_the_budget_lie_on_disk() -> None:
    arrays = [np.random.default_rng(seed).random((10, 10)) for seed in range(5)]
    with SpilledArrays(budget=2 * 800) as held:
        for array in arrays:
            held.append(array)
        assert held.bytes_held == 1600
        for given, array in zip(held, arrays, strict=True):
            np.testing.assert_array_equal(given, array)
        assert held._folder is not None
        folder = Path(held._folder.name)
        assert len(list(folder.iterdir())) == 3
    assert not folder.exists()


def test_the_command_says_what_it_would_do(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    add_scenes(store, 1, {"set/0.png": scene(0)})
    asked = ["cosegment", store.uri, "things", *as_options(), "--dry-run"]
    shown = CliRunner().invoke(app, [*asked, "--sets", "directory"])
    assert shown.exit_code == 0 and "1 image in 1 set (directory): 0 were done, 1 to segment in 1 set" in shown.output
    assert CliRunner().invoke(app, [*asked, "--sets", "folders"]).exit_code == 2
    done = CliRunner().invoke(app, [*asked[:-1], "--sets", "directory", "--json"])
    assert done.exit_code == 0 and '"segmented": 1' in done.stdout
