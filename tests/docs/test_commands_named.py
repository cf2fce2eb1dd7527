"""Every `dinoray WORD` that code or pages name is a command."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main
from documents import ROOT, pages

from pipelines import cli
from pipelines.jobs import JOBS

SOURCES = [*sorted(ROOT.glob("pipelines/**/*.py")), *sorted(ROOT.glob("dino*/**/*.py*"))]
EXAMPLES = [one for folder in ("examples", "configs") for one in sorted((ROOT / folder).rglob("*")) if one.is_file()]
PAGES = [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Strings are broken over lines in code.
NAMED = re.compile(r"`dinoray\s+(?:\"\s*f?\")?([a-z]+)")


def commands() -> set[str]:
    return set(typer.main.get_command(cli.app).commands) | {command.partition(" ")[0] for command in JOBS}


def wrong_in(paths: list[Path]) -> dict[str, set[str]]:
    """What stands after `dinoray and is no command, by file."""
    found = {str(path.relative_to(ROOT)): named_in(path) - commands() for path in paths}
    return {path: words for path, words in found.items() if words}


def named_in(path: Path) -> set[str]:
    try:
        return set(NAMED.findall(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError:
        return set()


def test_commands_are_looked_for_where_they_are_named() -> None:
    found = set[str]().union(*(named_in(path) for path in [*SOURCES, *PAGES]))
    assert {"repair", "extract", "verify"} <= found and len(found) > 8


def test_commands_that_pages_name_exist() -> None:
    assert wrong_in(PAGES) == {}


def test_commands_that_code_and_examples_name_exist() -> None:
    assert wrong_in([*SOURCES, *EXAMPLES]) == {}
