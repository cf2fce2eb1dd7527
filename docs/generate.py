"""Writes docs/tables.md, docs/settings.md and dinoray/__init__.pyi out of the code, so that they cannot contradict it.

make docs
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dino_ops.training_presets import PRESETS
from docs import python_stubs
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config, ExtraFeature, Section
from pipelines.store.schemas import TABLES, Column, TableDescription

DOCS = Path(__file__).parent
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
PLAIN_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
EXTRA = "features.extra=[{layer: 9, facet: key}]"


def main() -> None:
    for name, page in (("tables.md", tables_page()), ("settings.md", settings_page())):
        (DOCS / name).write_text(page, encoding="utf-8")
        print(f"docs/{name}")
    python_stubs.FILE.write_text(python_stubs.stubs(), encoding="utf-8")
    print("dinoray/__init__.pyi")


def tables_page() -> str:
    """docs/tables.md: every table of a store and what its columns mean."""
    return "\n".join([TABLES_INTRODUCTION, *(_table_section(table) for table in TABLES)])


def settings_page() -> str:
    """docs/settings.md: every setting with its default, its allowed values and what it does."""
    sections = [_settings_section(name, field.annotation) for name, field in Config.model_fields.items()]
    return "\n".join([SETTINGS_INTRODUCTION, *sections, _presets()])


def _table_section(table: TableDescription) -> str:
    variants = [
        table.columns(load_config(overrides=overrides)) for overrides in ((EXTRA,), (EXTRA, "store.dtype=int8"))
    ]
    columns: dict[str, list[Column]] = {}
    for column in [*variants[0], *variants[1]]:
        columns.setdefault(column.name, []).append(column)
    rows = [(f"`{name}`", _types(same), _about(same, variants)) for name, same in columns.items()]
    return f"## {table.place}\n\n{table.about}\n\n{_markdown_table(('column', 'type', 'meaning'), rows)}"


def _types(same: Sequence[Column]) -> str:
    return " or ".join(dict.fromkeys(_type_name(column.type) for column in same))


def _about(same: Sequence[Column], variants: Sequence[Sequence[Column]]) -> str:
    """The meaning, and where a column is there with int8 alone, that."""
    only_int8 = same[0].name not in [column.name for column in variants[0]]
    return same[0].about + ("; only with `store.dtype=int8`" if only_int8 else "")


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_type_name(kind.value_type)}"
    if pa.types.is_timestamp(kind):
        return "timestamp (µs, UTC)"
    return str(kind)


def _settings_section(name: str, section: type[Section]) -> str:
    rows = []
    for key, field in section.model_fields.items():
        rows.append((f"`{name}.{key}`", _default(field), _allowed(field), field.description or ""))
    return f"## {name}\n\n{_markdown_table(('setting', 'default', 'values', 'what it does'), rows)}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    return "none" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _allowed(field: FieldInfo) -> str:
    return _with_bounds(_kind(field.annotation), field.metadata)


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [one for extra in arguments[1:] for one in getattr(extra, "metadata", [extra])]
        return _with_bounds(_kind(arguments[0]), metadata)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(one) for one in arguments if one is not type(None))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list: {_kind(arguments[0])}"
    if origin is tuple:
        kinds = [_kind(one) for one in arguments]
        return f"{len(kinds)} values: {'; '.join(dict.fromkeys(kinds))}"
    if origin is dict:
        return "keys with values"
    if annotation is ExtraFeature:
        return "`{layer, facet}`"
    return PLAIN_NAMES[annotation]


def _with_bounds(kind: str, metadata: Iterable[Any]) -> str:
    bounds = [
        words.format(f"{getattr(one, name):,}")
        for one in metadata
        for name, words in BOUNDS.items()
        if getattr(one, name, None) is not None
    ]
    return " ".join([kind, " and ".join(bounds)]).strip()


def _presets() -> str:
    changes = {name: [f"`train.{key}={value}`" for key, value in values.items()] for name, values in PRESETS.items()}
    rows = [(f"`{name}`", ", ".join(values) or "nothing") for name, values in changes.items()]
    return f"## Presets of train\n\n{_markdown_table(('preset', 'what it changes'), rows)}"


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES_INTRODUCTION = """\
# Tables

This page is generated from [pipelines/store/schemas.py](../pipelines/store/schemas.py), where every column is defined:
run `make docs` after a change there.

Every table is a Delta Lake table: zstd-compressed Parquet files and a log beside them. Files hold whole images in key
order, so a lookup by `image_id` reads one row group. [Python](python.md) shows how to read them, and
[inputs](inputs.md) explains `image_id` and `label`.

    STORE/
      store.json     the spec and its fingerprint
      images/        one row per image
      patches/       one row per patch
      failures/      one row per image that could not be processed
      projection/    the fitted PCA, when store.pca asks for one
      clusters/NAME/ tables centroids and assignments, and the model that they belong to, from `dinoray cluster`
      parts/NAME/    tables images and patches, settings.json and models/, from `dinoray cosegment`
      matches/NAME/  tables pairs and matches, settings.json, from `dinoray correspond`
      index/NAME/    FAISS files and their manifest, from `dinoray index`
      runs/          one JSON report for each run: what was asked, what was done, how fast, and what failed
      transactions/  the store's own log: a small file for each change (docs/transactions.md)
      pipeline/      what `dinoray run` remembers, to do only what is due
      report.html    photos and what was found in them, from `dinoray report`

`patches` stores descriptors as `store.dtype` says:

| `store.dtype` | stored as | bytes per value |
| --- | --- | --- |
| `float16` (default) | FLOAT, rounded to half precision; readable everywhere, and as small as true half floats | 1.9 |
| `float32` | FLOAT, exact | 3.8 |
| `int8` | list of int8 with one `scale` for each row | 0.9 |

`patches` has a further column `descriptor_FACETLAYER` for each entry of `features.extra`; `descriptor_key9` below is an
example.
"""

SETTINGS_INTRODUCTION = """\
# Settings

This page is generated from [pipelines/settings/sections.py](../pipelines/settings/sections.py), where every setting is
defined: run `make docs` after a change there. `dinoray settings` prints the same with the values that are in effect.

Give settings in YAML files or one by one. Later files win over earlier ones, and `--set` wins over files. An unknown
key is an error that names the nearest known one.

    dinoray extract photos features -c configs/extract.yaml --set features.stride=8

The settings of `model`, `image`, `features` and `store` decide the values in a store. They are its spec, and a store
has one spec for life. `model.device` and `model.compile` and the settings of the other sections may change from run to
run.
"""


if __name__ == "__main__":
    main()
