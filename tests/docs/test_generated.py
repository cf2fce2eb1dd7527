"""What `make docs` makes of the code is up to date, and the tables' schemas stay plain."""

from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT

from docs import python_stubs
from docs.generate import settings_page, tables_page
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config
from pipelines.store import schemas

DOCS = ROOT / "docs"
TABLES = {table.place: table for table in schemas.TABLES}


@pytest.mark.parametrize(("name", "make"), [("tables.md", tables_page), ("settings.md", settings_page)])
def test_generated_pages_are_up_to_date(name: str, make: object) -> None:
    assert callable(make)
    assert (DOCS / name).read_text(encoding="utf-8") == make(), f"run `make docs`, which writes docs/{name}"


def test_the_signatures_for_type_checkers_are_up_to_date() -> None:
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", "dinoray/__init__.pyi", "-"],
        input=python_stubs.stubs(), capture_output=True, text=True, check=True, cwd=DOCS.parent,
    ).stdout  # fmt: skip
    assert python_stubs.FILE.read_text(encoding="utf-8") == formatted, (
        "run `make docs`, which writes dinoray/__init__.pyi"
    )


def test_the_settings_page_has_every_setting_once() -> None:
    page = settings_page()
    for section, about in Config.model_fields.items():
        for key in about.annotation.model_fields:
            assert page.count(f"\n| `{section}.{key}` |") == 1


def test_every_column_has_its_meaning() -> None:
    page = tables_page()
    for place, table in TABLES.items():
        section = page.partition(f"\n## {place}\n")[2].partition("\n## ")[0]
        for column in table.columns(load_config()):
            assert len(column.about) > 5 and f"\n| `{column.name}` |" in section


def test_every_schema_is_described_by_one_table() -> None:
    """A table whose columns are changed in one of the two places alone would be described wrongly."""
    config = load_config(overrides=["store.dtype=int8"])
    described = [schemas.schema_of(table.columns(config)) for table in TABLES.values()]
    names = ["IMAGES", "FAILURES", "CENTROIDS", "ASSIGNMENTS", "PARTS_IMAGES", "PARTS_PATCHES", "PAIRS", "MATCHES"]
    stored = [*(getattr(schemas, name) for name in names), schemas.patches_schema(config)]
    assert len(described) == len(stored)
    assert all(schema in described for schema in stored)


def test_meanings_never_reach_the_files() -> None:
    """Field metadata would end in the Delta log of every store."""
    for table in TABLES.values():
        schema = schemas.schema_of(table.columns(load_config()))
        assert schema.metadata is None and all(field.metadata is None and field.nullable for field in schema)
