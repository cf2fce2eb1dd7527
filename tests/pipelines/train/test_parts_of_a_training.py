"""Parts of a training that need no Ray: crops of a batch, watching the curve, settings, log, checkpoints, the card."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from flipped_bits import flipped_bits
from small_runs import photo

from dino_ops.multicrop import Crops, MultiCrop
from dino_ops.recipe import Recipe
from dino_ops.training_presets import PRESETS
from pipelines.errors import JobError, RequestError
from pipelines.settings.loading import load_config
from pipelines.settings.sections import TrainSettings
from pipelines.sources import LISTING_SCHEMA, list_images
from pipelines.train.accuracy import K, choose_labelled
from pipelines.train.batches import MAX_SUBSTITUTES_PER_IMAGE, Reading, epoch_order, make_crops, make_views, read_images
from pipelines.train.card import make_card
from pipelines.train.checkpoints import list_checkpoints, read_checkpoint, remove_old, write_checkpoint
from pipelines.train.job import Result
from pipelines.train.log import TrainingLog, read_log
from pipelines.train.monitor import CollapseWatch, Monitor
from pipelines.train.setup import digest, make_recipe, make_setup
from pipelines.train.tensorboard import EventFile

READING = Reading(seed=3, max_pixels=10**7, attempts=1, storage_options={})
SMALL = MultiCrop(global_size=32, local_size=16, local_crops=3)


# batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "input"
    made.mkdir()
    for number in range(12):
        photo(number).save(made / f"{number:02d}.png")
    return made


def equal(one: Crops, other: Crops) -> bool:
    return np.array_equal(one.whole, other.whole) and np.array_equal(one.local, other.local)


def test_the_order_of_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(100, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert np.array_equal(orders[0], orders[3])
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])


def test_crops_are_the_same_however_a_batch_is_split_and_unreadable_images_are_replaced(folder: Path) -> None:
    (folder / "03.png").write_bytes(b"no image")
    (folder / "07.png").unlink()
    (folder / "07.png").mkdir()  # cannot be read at all
    listing = list_images(str(folder)).table
    (folder / "08.png").unlink()  # gone since it was listed
    bad_ids = {"03.png", "08.png"}
    order = epoch_order(len(listing), 3, 5)
    ids = np.array(listing["image_id"].to_pylist())
    whole, bad = make_crops(listing, order, range(len(order)), 5, SMALL, READING)
    assert whole.whole.shape == (2, len(order), 32, 32, 3) and whole.local.shape == (3, len(order), 16, 16, 3)
    assert {one.image_id for one in bad} == bad_ids
    assert all(one.error and one.message and one.uri.endswith(one.image_id) for one in bad)
    for edges in ([0, 1, 4, len(order)], [*range(len(order) + 1)]):
        pieces = [make_crops(listing, order, range(a, b), 5, SMALL, READING) for a, b in itertools.pairwise(edges)]
        assert equal(Crops.joined([crops for crops, _ in pieces]), whole)
        assert {one.image_id for _, its in pieces for one in its} == bad_ids
    for place, row in enumerate(order):
        substitute = row
        if ids[row] in bad_ids:  # the first readable one, half an epoch further on
            candidates = [order[(place + len(order) // 2 + further) % len(order)] for further in range(3)]
            substitute = next(one for one in candidates if ids[one] not in bad_ids)
        from PIL import Image

        with Image.open(folder / ids[substitute]) as picture:
            expected = SMALL(picture.convert("RGB"), np.random.default_rng([3, 5, int(substitute)]))
        assert equal(whole.of(slice(place, place + 1)), expected), place


def test_another_epoch_has_other_crops_of_an_image(folder: Path) -> None:
    listing, order = list_images(str(folder)).table, np.arange(12)
    one, other = (make_crops(listing, order, range(4), epoch, SMALL, READING)[0] for epoch in (0, 1))
    assert not np.array_equal(one.whole[:, 0], other.whole[:, 0])


def test_many_unreadable_in_a_row_end_the_job(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.jpg").write_bytes(b"no image")
    photo(1).save(tmp_path / "39.jpg")
    order = np.arange(40)  # the first image's substitutes are those from 20 to 39
    crops, bad = make_crops(list_images(str(tmp_path)).table, order, range(1), 0, SMALL, READING)
    assert crops.images == 1 and [one.image_id for one in bad] == ["00.jpg", *(f"{at}.jpg" for at in range(20, 39))]
    (tmp_path / "39.jpg").rename(tmp_path / "18.jpg")
    with pytest.raises(
        JobError, match=rf"{MAX_SUBSTITUTES_PER_IMAGE + 1} images in a row cannot be read .*check INPUT"
    ):
        make_crops(list_images(str(tmp_path)).table, np.arange(39), range(1), 0, SMALL, READING)


def test_views_leave_unreadable_images_out(folder: Path) -> None:
    (folder / "03.png").write_bytes(b"no image")
    listing = list_images(str(folder)).table
    views, rows, bad = make_views(listing, np.array([2, 3, 5]), 32, READING)
    assert views.shape == (2, 32, 32, 3) and rows.tolist() == [2, 5] and [one.image_id for one in bad] == ["03.png"]
    views, rows, _ = make_views(listing, np.array([3]), 32, READING)
    assert views.shape == (0, 32, 32, 3) and len(rows) == 0


# the curve


def line(step: int, **values: float) -> dict[str, float]:
    healthy = {"loss": 3.0, "teacher_entropy": 2.5, "divergence": 0.5}
    return {"step": step, **healthy, **values}


EVEN = {"loss": math.log(64), "teacher_entropy": math.log(64) - 1e-4, "divergence": 1e-4}
ONE = {"loss": 0.4, "teacher_entropy": 0.01, "divergence": 0.39}
NOTHING = {"loss": 2.5, "teacher_entropy": 2.4995, "divergence": 5e-4}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (EVEN, ["ln(out_dim) being 4.159", "no opinion", "train.teacher_temperature"]),
        (ONE, ["entropy has fallen to 0.010 nats", "few prototypes", "train.centring=sinkhorn"]),
        (NOTHING, ["divergence 0.0005 nats", "nothing more is being learnt", "train.learning_rate"]),
    ],
    ids=["even", "one", "nothing"],
)
def test_a_collapse_is_said_once_and_not_before_its_time(values: dict[str, float], said: list[str]) -> None:
    watch = CollapseWatch(64, 3000)  # watched from a tenth of the steps
    assert [watch.look(line(step, **values)) for step in (1, 200, 299)] == [[], [], []]
    ((sentence,),) = (watch.look(line(300, **values)),)
    assert all(part in sentence for part in said)
    assert watch.look(line(310, **values)) == watch.look(line(3000, **values)) == []
    others = [other for other in (EVEN, ONE, NOTHING) if other is not values]
    assert all(len(watch.look(line(320, **other))) == 1 for other in others), "one collapse hides another"


def test_short_trainings_are_not_judged_by_their_beginning() -> None:
    assert CollapseWatch(64, 1000).look(line(199, **EVEN)) == []
    assert len(CollapseWatch(64, 1000).look(line(200, **EVEN))) == 1
    assert len(CollapseWatch(64, 50).look(line(50, **EVEN))) == 1


def test_a_healthy_curve_is_passed_in_silence() -> None:
    watch = CollapseWatch(65536, 1000)
    most = math.log(65536)
    for step in range(1, 1001):
        # as in practice: at first all is even, then the teacher makes up its mind and the student follows
        entropy = most * (0.9 - 0.5 * step / 1000) if step > 100 else most
        record = line(step, loss=entropy + 0.3, teacher_entropy=entropy, divergence=0.3)
        assert watch.look(record) == []
        assert watch.look({"step": step, "knn_accuracy": 0.1}) == []


def test_the_monitor_lists_an_image_once_and_tells_news() -> None:
    earlier = {"image_id": "a", "uri": "a", "error": "ImageError", "message": "before"}
    monitor = Monitor([earlier])
    assert monitor.report([line(1)], [{**earlier, "message": "now"}, {**earlier, "image_id": "b"}]) is False
    monitor.stop()
    assert monitor.report([line(2)], []) is True
    assert [(one["image_id"], one["message"]) for one in monitor.bad_images()] == [("a", "before"), ("b", "before")]
    assert [record["step"] for record in monitor.news(1)["records"]] == [2] and monitor.news(0)["bad"] == 2


# settings


def test_defaults_are_the_recipe_s() -> None:
    settings, recipe = TrainSettings(), Recipe()
    for field in dataclasses.fields(Recipe):
        if field.name != "multicrop":
            assert getattr(settings, field.name) == getattr(recipe, field.name), field.name
    for field in dataclasses.fields(MultiCrop):
        given = TrainSettings.model_fields.get(field.name)
        assert given is None or getattr(settings, field.name) == getattr(recipe.multicrop, field.name), field.name
    assert make_recipe(settings) == recipe


def test_every_setting_reaches_the_recipe() -> None:
    """Each changed alone is found in the recipe, or is one of those that say nothing of how is trained."""
    others = {"preset", "accumulate", "validation", "evaluate_epochs", "evaluate_images", "checkpoint_steps"}
    others |= {"checkpoint_minutes", "keep_checkpoints", "log_steps", "weights_dtype"}
    changed: dict[str, Any] = {
        "centring": "sinkhorn",
        "normalise_prototypes": False,
        "global_scale": (0.3, 0.9),
        "local_scale": (0.1, 0.2),
        "jitter": (0.1, 0.2, 0.3, 0.4),
    }
    for name, default in TrainSettings():
        if name in others:
            continue
        value = changed.get(name)
        if value is None:
            value = default + 1 if isinstance(default, int) else 0.5 if default != 0.5 else 0.25
        recipe = make_recipe(TrainSettings.model_validate({name: value}))
        found = getattr(recipe, name) if hasattr(recipe, name) else getattr(recipe.multicrop, name)
        assert found == value and recipe != Recipe(), name


@pytest.mark.parametrize("preset", ["small_data", "small_batches"])
def test_presets_fill_only_what_was_not_given(preset: str) -> None:
    settings = load_config([], [f"train.preset={preset}"]).train
    plain = TrainSettings()
    for name, value in settings:
        expected = preset if name == "preset" else PRESETS[preset].get(name, getattr(plain, name))
        assert value == expected, name
    given = load_config([], [f"train.preset={preset}", "train.out_dim=77", "train.momentum=0.9"]).train
    assert (given.out_dim, given.momentum) == (77, 0.9)
    assert given.model_dump(exclude={"out_dim", "momentum"}) == settings.model_dump(exclude={"out_dim", "momentum"})
    # a value that is the published one was given all the same
    assert load_config([], [f"train.preset={preset}", "train.out_dim=65536"]).train.out_dim == 65536


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.global_scale=[1.0,0.4]", "global_scale is [1.0, 0.4]: give the smaller part first"),
        ("train.local_scale=[0.5,0.1]", "local_scale is [0.5, 0.1]: give the smaller part first"),
        ("train.global_scale=[0,1]", "global_scale"),
        ("train.preset=large", "preset"),
        ("train.batch_size=1", "batch_size"),
        ("train.epochs=0", "epochs"),
        ("train.momentum=1.5", "momentum"),
        ("train.drop_path=1", "drop_path"),
        ("train.centring=median", "centring"),
        ("train.temperature=1", "temperature"),
    ],
)
def test_wrong_settings(override: str, said: str) -> None:
    with pytest.raises(RequestError) as error:
        load_config([], [override])
    assert said in str(error.value)


def test_growing_crops_are_whole_patches_and_end_at_their_size() -> None:
    recipe = make_recipe(load_config([], ["train.growing_from=0.5", "train.epochs=10"]).train)
    sizes = [(made.global_size, made.local_size) for made in (recipe.multicrop_at(epoch, 16) for epoch in range(10))]
    assert sizes[0] == (112, 48) and sizes[-1] == sizes[8] == (224, 96) and sizes == sorted(sizes)
    assert all(size % 16 == 0 for both in sizes for size in both)


def test_the_digest_tells_images_versions_and_their_order(folder: Path) -> None:
    table = list_images(str(folder)).table
    before = digest(table)
    assert before == digest(list_images(str(folder)).table) and before != digest(table.slice(1))
    photo(99).save(folder / "05.png")
    assert digest(list_images(str(folder)).table) != before


# labels


def test_labelled_images_are_a_fixed_sample_and_unknown_labels_match_nothing(tmp_path: Path) -> None:
    for number in range(60):
        path = tmp_path / "in" / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    photo(60).save(tmp_path / "in" / "unlabelled.png")
    for number, label in enumerate("abz"):
        path = tmp_path / "test" / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    images, validation = (list_images(str(tmp_path / name)).table for name in ("in", "test"))
    chosen = choose_labelled(images, validation, 30, 5)
    again = choose_labelled(images, validation, 30, 5)
    assert chosen is not None and again is not None and chosen.tested is not None
    assert len(chosen.voting) == 30 and chosen.voting.equals(again.voting)
    assert chosen.voting["label"].to_pylist() == ["abc"[label] for label in chosen.voting_labels]
    assert chosen.tested_labels.tolist() == [0, 1, -1]
    everyone = choose_labelled(images, None, 5000, 5)
    assert everyone is not None and len(everyone.voting) == 60 and everyone.tested is None
    assert choose_labelled(images, None, K, 5) is None  # all would vote on each
    assert choose_labelled(images.filter(np.asarray(images["label"]) == "a"), None, 5000, 5) is None
    assert choose_labelled(images, validation.slice(0, 0), 5000, 5) is None


# log and checkpoints


def record(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0 / (step + 1), "time": 0.0, **values}


def test_continuing_takes_away_what_was_logged_after_the_checkpoint(tmp_path: Path) -> None:
    output = str(tmp_path)
    log = TrainingLog(output, 0, {})
    log.add({"step": 0, "knn_accuracy": 0.1, "time": 0.0})
    for step in (1, 2, 3, 4):
        log.add(record(step))
    log.start_segment(4)
    log.add({"step": 4, "knn_accuracy": 0.2, "time": 0.0})  # found after the checkpoint
    log.add(record(5))
    log.close()
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["from-00000000.jsonl", "from-00000004.jsonl"]
    assert [one["step"] for one in read_log(output, {})] == [0, 1, 2, 3, 4, 4, 5]
    again = TrainingLog(output, 4, {})
    assert [(one["step"], one.get("loss")) for one in read_log(output, {})][-1] == (4, 0.2)
    again.add(record(5, loss=7.0))
    again.close()
    assert [(one["step"], one.get("loss")) for one in read_log(output, {})][-1] == (5, 7.0)
    TrainingLog(output, 2, {}).close()
    assert [one["step"] for one in read_log(output, {})] == [0, 1, 2]
    TrainingLog(output, 0, {}).close()
    assert read_log(output, {}) == []


def test_curves_of_two_trainings_in_one_second_have_a_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tensorboardX names files by the second: the second training would write over the file of the first."""
    monkeypatch.setattr("tensorboardX.event_file_writer.time", SimpleNamespace(time=lambda: 1_700_000_000.0))
    for step, tag in ((0, "loss"), (3, "accuracy")):
        events = EventFile(str(tmp_path), step)
        events.add({"step": step + 1, "time": 0.0, tag: 1.0})
        events.close()
    earlier, later = sorted(tmp_path.iterdir())
    assert b"loss" in earlier.read_bytes() and b"accuracy" in later.read_bytes(), "names are in the order of time"


def test_the_log_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TrainingLog(str(tmp_path), 0, {})
    log.add(record(1))
    assert read_log(str(tmp_path), {}) == []
    monkeypatch.setattr("pipelines.train.log.WRITE_SECONDS", 0)
    log.add(record(2))
    assert [one["step"] for one in read_log(str(tmp_path), {})] == [1, 2]
    log.close()


def test_checkpoints_come_back_and_the_latest_stay(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert list_checkpoints(output, {}) == []
    for step in (5, 30, 100):
        state = {"student": {"weight": torch.full((2,), float(step))}}
        write_checkpoint(output, state, step, {"model.name": "x", "tuple": [1, 2]}, {})
    (tmp_path / "checkpoints" / "step-00000200.pt.123.partial").write_bytes(b"half")
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert list_checkpoints(output, {}) == [5, 30, 100]
    state, agreement = read_checkpoint(output, 30, {})
    assert state.keys() == {"student"} and state["student"]["weight"].tolist() == [30, 30]
    assert agreement == {"model.name": "x", "tuple": [1, 2]}
    remove_old(output, 2, {})
    assert list_checkpoints(output, {}) == [30, 100] and (tmp_path / "checkpoints" / "notes.txt").exists()


def test_a_flipped_bit_of_a_checkpoint_is_a_sentence_or_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"student": {"weight": torch.randn(64, 32)}, "epoch": 3}
    write_checkpoint(str(tmp_path), state, 5, {"model.name": "x"}, {})
    file = tmp_path / "checkpoints" / "step-00000005.pt"
    found = 0
    for at in flipped_bits(file, range(file.stat().st_size), 300):
        try:
            read, agreement = read_checkpoint(str(tmp_path), 5, {})
        except JobError as error:
            assert "is damaged: remove it" in str(error)
            found += 1
        else:
            assert torch.equal(read["student"]["weight"], state["student"]["weight"]), f"byte {at}"
            assert (read["epoch"], agreement) == (3, {"model.name": "x"})
    assert found > 150


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("what", ["code", "no about", "list", "newer"])
def test_checkpoints_that_are_none(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content: Any = {
        "code": {"dinoray": Bomb()},
        "no about": {"student": {}},
        "list": [1],
        "newer": {"dinoray": {"schema_version": 99, "agreement": {}}},
    }[what]
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "step-00000001.pt")
    with pytest.raises(JobError, match="newer dinoray" if what == "newer" else "is damaged: remove it"):
        read_checkpoint(str(tmp_path), 1, {})
    assert not (tmp_path / "executed").exists()


# the card


def test_a_long_curve_is_shown_in_some_lines_with_every_accuracy(folder: Path) -> None:
    config = load_config([], ["model.name=test_vit", "train.batch_size=4", "train.validation=val"])
    training = make_setup(config, "s3://bucket/out", list_images(str(folder)).table, "run")
    records: list[dict[str, Any]] = []
    for step in range(1, 501):
        records.append({"step": step, "epoch": step / 3, "loss": 5 - step / 100, "teacher_entropy": 2.0})
        if step % 60 == 0:
            records.append({"step": step, "epoch": step / 3, "knn_accuracy": step / 1000})
    result = Result("run", "s3://bucket/out", "in", "test_vit", device="cuda", workers=2)
    card = make_card(training, records, result)
    rows = [row for row in card.splitlines() if row.startswith("| ") and row.count("|") == 5][1:]
    assert 20 <= len(rows) <= 32
    assert [row for row in rows if "%" in row] == [
        f"| {step / 3:.2f} | {5 - step / 100:.3f} | 2.000 | {step / 1000:.1%} |" for step in range(60, 481, 60)
    ]
    assert rows[-1].startswith("| 166.67 | 0.000 |")
    assert "2 GPU workers" in card and "on the images of `val`; 6.0% at the beginning, 48.0% at the end" in card


def test_nothing_secret_is_in_a_card(folder: Path) -> None:
    asked = ["train.validation=https://me:hush@host/val", "model.weights=random", "train.batch_size=4"]
    config = load_config([], ["model.name=test_vit", *asked])
    training = make_setup(config, "s3://key:hush@bucket/out", list_images(str(folder)).table, "run")
    records = [{"step": 60, "epoch": 1.0, "knn_accuracy": 0.5}]
    result = Result("run", "s3://bucket/out", "https://host/photos.csv?sig=hush", "test_vit", device="cpu", workers=2)
    card = make_card(training, records, result)
    assert "hush" not in card
    for shown in ("https://host/photos.csv?sig=...", "https://...@host/val", "model.weights=s3://...@bucket/out"):
        assert shown in card


def test_nothing_secret_is_said_of_an_image_that_cannot_be_read() -> None:
    row = {"image_id": "a", "uri": "http://me:hush@127.0.0.1:9/a.png", "source_size": 10}
    listing = pa.Table.from_pylist([row], schema=LISTING_SCHEMA)
    (picture,), (bad,) = read_images(listing, np.array([0]), 16, Reading(0, 10**6, 1, {}))
    assert picture is None and bad.uri == "http://127.0.0.1:9/a.png" and "hush" not in bad.message


def test_nothing_secret_is_in_an_agreement(folder: Path) -> None:
    config = load_config([], ["model.name=test_vit", "train.batch_size=4", "storage.options.secret=hush"])
    training = make_setup(config, "s3://bucket/out", list_images(str(folder)).table, "run")
    assert "hush" not in json.dumps(training.agreement())
