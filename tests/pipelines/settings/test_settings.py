"""Settings: defaults, merging, and mistakes answered with one sentence that names the key, the value and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from pipelines.errors import RequestError
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"weights": "pretrained", "device": "auto", "precision": "auto", "compile": False},
    "image": {
        "shorter_side": 224,
        "size": None,
        "native": False,
        "resample": "lanczos",
        "crop": "none",
        "mean": None,
        "std": None,
    },
    "features": {
        "layer": 11,
        "facet": "key",
        "extra": [],
        "stride": None,
        "final_norm": False,
        "position": "dino",
        "saliency_heads": "all",
        "channel_order": "head_major",
    },
    "store": {"dtype": "float16", "pca": None, "patches": "all", "every": 1},
    "run": {
        "address": None,
        "workers": None,
        "cpus_per_worker": None,
        "gpus_per_worker": None,
        "batch_size": "auto",
        "images_per_shard": None,
        "commit_seconds": 30,
        "max_failed_fraction": 0.1,
        "attempts": 3,
    },
}


def mistake(*overrides: str, files: tuple[Path, ...] = ()) -> str:
    """The sentence that answers wrong settings."""
    with pytest.raises(RequestError) as raised:
        load_config(files, overrides)
    sentence = str(raised.value)
    assert "\n" not in sentence and "pydantic" not in sentence
    return sentence


@pytest.mark.parametrize("section", DEFAULTS)
def test_defaults_are_those_of_the_contract(section: str) -> None:
    values = load_config().model_dump(mode="json")[section]
    assert {key: values[key] for key in DEFAULTS[section]} == DEFAULTS[section]


def test_the_commented_example_repeats_the_defaults() -> None:
    example = ROOT / "configs" / "extract.yaml"
    assert load_config([example]) == load_config()


def test_every_setting_says_what_it_does() -> None:
    for section, field in Config.model_fields.items():
        assert field.annotation is not None
        for key, about in field.annotation.model_fields.items():
            assert about.description and about.description.endswith("."), f"{section}.{key}"


def test_later_files_win_over_earlier_ones_and_overrides_over_both(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("features:\n  layer: 9\n  stride: 4\nstore:\n  dtype: int8\n")
    second.write_text("features:\n  stride: 8\n  facet: token\n")
    config = load_config([first, second], ["features.facet=value"])
    assert (config.features.layer, config.features.stride, config.features.facet) == (9, 8, "value")
    assert config.store.dtype == "int8"
    assert load_config([second, first]).features.stride == 4


def test_a_later_override_wins() -> None:
    assert load_config([], ["features.layer=3", "features.layer=4"]).features.layer == 4


def test_an_override_reads_its_value_as_yaml() -> None:
    config = load_config([], ["features.saliency_heads=[0, 2]", "features.extra=[{layer: 9}]", "image.size=[32, 48]"])
    assert config.features.saliency_heads == (0, 2)
    assert [item.column for item in config.features.extra] == ["descriptor_key9"]
    assert config.image.size == (32, 48) and config.image.shorter_side is None


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path: Path) -> None:
    empty, section = tmp_path / "empty.yaml", tmp_path / "section.yaml"
    empty.write_text("# nothing yet\n")
    section.write_text("model:\n  # name: dino_vits8\nfeatures:\n  layer: 5\n")
    assert load_config([empty, section], ["features.layer=11"]) == load_config()


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("features.strid=8", "features.stride"),
        ("image.shorter_size=8", "image.shorter_side"),
        ("run.worker=1", "run.workers"),
        ("feature.stride=8", "features"),
        ("modle.name=x", "model"),
        ("model.stride=8", "features.stride"),
        ("features.pca=8", "store.pca"),
        ("model.batch_size=8", "run.batch_size"),
        ("features.extra=[{layer: 9, facets: key}]", "features.extra.0.facet"),
        ("features.extra=[{layer: 9}, {layers: 8}]", "features.extra.1.layer"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(override: str, nearest: str) -> None:
    sentence = mistake(override)
    assert sentence.startswith("Unknown setting ") and sentence.endswith(f"did you mean {nearest}?")


def test_an_unknown_key_in_a_file_is_answered_the_same(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("features:\n  strid: 8\n")
    assert mistake(files=(file,)) == "Unknown setting features.strid: did you mean features.stride?"


def test_a_key_like_no_other_is_answered_with_the_known_ones() -> None:
    assert mistake("store.zzz=1").endswith("known here: dtype, pca, patches, every, salient_threshold.")
    assert mistake("zzz.qqq=1").endswith(f"known here: {', '.join(Config.model_fields)}.")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.device=gpu", ["model.device", "'gpu'", "'auto'", "'cpu'", "'cuda'"]),
        ("store.dtype=float64", ["store.dtype", "'float64'", "'float16'", "'float32'", "'int8'"]),
        ("features.facet=keys", ["features.facet", "'keys'", "'key', 'query', 'value' or 'token'"]),
        ("features.extra=[{layer: 9, facet: keys}]", ["features.extra.0.facet", "'keys'", "'token'"]),
        ("features.extra=[{facet: key}]", ["features.extra.0.layer", "missing"]),
        ("features.extra=[9]", ["features.extra.0", "layer, facet", "9"]),
        ("features.extra={layer: 9}", ["features.extra", "{'layer': 9}", "list"]),
        ("features.layer=-1", ["features.layer", "-1", "greater than or equal to 0"]),
        ("features.layer=deep", ["features.layer", "'deep'", "integer"]),
        ("features.layer=1.5", ["features.layer", "1.5", "integer"]),
        ("features.stride=0", ["features.stride", "0", "greater than or equal to 1"]),
        ("features.saliency_heads=some", ["features.saliency_heads ", "'some'", "'all' or a list"]),
        ("features.saliency_heads=[a]", ["features.saliency_heads ", "['a']", "'all' or a list"]),
        ("image.size=[224]", ["image.size ", "[224]", "2 values"]),
        ("image.size=[8, 8, 8]", ["image.size ", "[8, 8, 8]", "2 values"]),
        ("image.size=[0, 64]", ["image.size.0", "0", "greater than or equal to 8"]),
        ("image.mean=[0.5]", ["image.mean ", "[0.5]", "3 values"]),
        ("image.std=[0.2, 0, 0.2]", ["image.std.1", "0", "greater than 0"]),
        ("image.shorter_side=4", ["image.shorter_side", "4", "greater than or equal to 8"]),
        ("run.batch_size=0", ["run.batch_size", "0", "`auto` or at least 1"]),
        ("run.batch_size=fast", ["run.batch_size ", "'fast'", "'auto' or a whole number"]),
        ("run.max_failed_fraction=2", ["run.max_failed_fraction", "2", "less than or equal to 1"]),
        ("run.commit_seconds=0", ["run.commit_seconds", "0", "greater than 0"]),
        ("model.name=", ["model.name", "None", "string"]),
        ("model.name.x=3", ["model.name", "{'x': 3}", "string"]),
        ("model.compile=maybe", ["model.compile", "'maybe'", "boolean"]),
    ],
)
def test_a_wrong_value_is_answered_with_key_value_and_choices(override: str, parts: list[str]) -> None:
    sentence = mistake(override)
    assert sentence.endswith(".") and sentence.count("Setting ") == 1
    for part in parts:
        assert part in sentence


def test_a_section_that_is_a_value_is_answered_with_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("store: float16\n")
    sentence = mistake(files=(file,))
    assert "store" in sentence and "dtype, pca" in sentence and "'float16'" in sentence


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("image.size=[64, 64]", "image.shorter_side=64"), "shorter_side and size"),
        (("image.native=true", "image.shorter_side=64"), "shorter_side and native"),
        (("image.native=true", "image.size=[64, 64]"), "size and native"),
    ],
)
def test_there_is_one_way_to_size_an_image(overrides: tuple[str, ...], named: str) -> None:
    assert f"{named} exclude each other" in mistake(*overrides)


def test_no_size_at_all_is_a_mistake() -> None:
    assert "native=true" in mistake("image.shorter_side=null")


@pytest.mark.parametrize("override", ["image.native=true", "image.size=native"])
def test_native_replaces_the_default_size(override: str) -> None:
    image = load_config([], [override]).image
    assert image.native and image.size is None and image.shorter_side is None


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("features.extra=[{layer: 11, facet: key}]",), "key11"),
        (("features.layer=4", "features.facet=token", "features.extra=[{layer: 4, facet: token}]"), "token4"),
        (("features.extra=[{layer: 9}, {layer: 9, facet: key}]",), "descriptor_key9"),
    ],
)
def test_extras_may_not_repeat_a_column(overrides: tuple[str, ...], named: str) -> None:
    sentence = mistake(*overrides)
    assert "features.extra" in sentence and named in sentence


def test_salient_patches_need_saliency() -> None:
    sentence = mistake("store.patches=salient", "features.saliency=false")
    assert "store.patches=salient" in sentence and "features.saliency=true" in sentence


@pytest.mark.parametrize(("text", "line"), [("model:\n  name: x\n bad: [\n", 3), ("x: 1\ny: a: b\n", 2)])
def test_bad_yaml_is_answered_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    sentence = mistake(files=(file,))
    assert str(file) in sentence and f"line {line}" in sentence


def test_files_that_cannot_be_settings_are_named(tmp_path: Path) -> None:
    listing, binary = tmp_path / "list.yaml", tmp_path / "binary.yaml"
    listing.write_text("- a\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for file, problem in [
        (listing, "list"),
        (binary, "cannot be read"),
        (tmp_path, "cannot be read"),
        (tmp_path / "absent.yaml", "does not exist"),
    ]:
        sentence = mistake(files=(file,))
        assert str(file) in sentence and problem in sentence


@pytest.mark.parametrize("override", ["stride=8", "features.stride", "features.=8", "=8", "features"])
def test_an_override_of_another_form_is_shown_the_form(override: str) -> None:
    sentence = mistake(override)
    name, equals, _ = override.partition("=")
    assert repr(f"{name}=..." if equals else name) in sentence and "section.key=value" in sentence


def test_an_override_without_its_section_is_shown_where_the_key_belongs() -> None:
    assert "--set store.pca=..." in mistake("pca=8")


def test_an_override_that_is_not_yaml_is_named() -> None:
    assert "'features.stride=...': the value is not valid YAML" in mistake("features.stride=[1")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "settings.yaml"
    tag = f"!!python/object/apply:os.mkdir ['{marker}']"
    file.write_text(f"model:\n  name: {tag}\n")
    assert "line 2" in mistake(files=(file,))
    assert "not valid YAML" in mistake(f"model.name={tag}")
    assert not marker.exists()


def test_secrets_are_kept_and_never_shown() -> None:
    config = load_config([], ["storage.options.secret=hush", "storage.options.client_kwargs={password: hush}"])
    assert config.storage.options["secret"] == "hush" and config.storage.options["client_kwargs"]["password"] == "hush"
    shown = config.without_secrets()
    assert shown["storage"]["options"].keys() == {"secret", "client_kwargs"}
    assert "hush" not in json.dumps(shown)


@pytest.mark.parametrize(
    "override",
    [
        "storage.options=hush",
        "storage.options.secret=[hush",
        "storage.options.secret.=hush",
        "storage.secret=hush",
        "storage=hush",
        "secret=hush",
        "model.device=s3://key:hush@bucket/a",
    ],
)
def test_a_mistake_in_storage_options_does_not_show_them(override: str) -> None:
    assert "hush" not in mistake(override)


@pytest.mark.parametrize("value", ["!hush", "*hush", "!<tag:hush> x", "!hush!x y", "[hush", "'hush"])
def test_a_secret_that_is_not_yaml_is_not_shown(value: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"storage:\n  options:\n    secret: {value}\n")
    sentence = mistake(files=(file,))
    assert "hush" not in sentence and "is not valid YAML (line" in sentence


def test_a_section_of_storage_that_is_a_value_does_not_show_it(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("storage: hush\n")
    assert mistake(files=(file,)) == "Setting storage is a section with keys (options), not a value."


def test_settings_that_are_uris_are_shown_without_their_credentials() -> None:
    shown = load_config([], ["model.weights=https://me:hush@host/w.pth?sig=hush"]).without_secrets()
    assert shown["model"]["weights"] == "https://...@host/w.pth?sig=..."


def test_checked_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().features.layer = 3  # type: ignore[misc]
