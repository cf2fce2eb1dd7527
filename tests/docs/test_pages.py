"""README.md is short and complete; links lead somewhere; files, symbols and tests that pages name are there."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
import typer.main
from documents import ROOT, anchors, code_words, links, pages

from pipelines import cli

PAGES = [*pages(), ROOT / "CONTRIBUTING.md"]
README = ROOT / "README.md"
FOLDERS = ("pipelines", "dino_ops", "tests", "examples", "configs", "benchmarks", "docs")
_TEST = re.compile(r"(?P<file>tests/[\w/]+\.py)(?:::(?P<name>[\w.]+))?")


def test_the_readme_is_short_and_names_every_command() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for command in typer.main.get_command(cli.app).commands:
        assert f"dinoray {command}" in text


def test_every_page_is_within_two_clicks_of_the_readme() -> None:
    first = {README.parent / target.partition("#")[0] for target in links(README)}
    second = {
        page.parent / target.partition("#")[0] for page in first if page.suffix == ".md" for target in links(page)
    }
    reached = {page.resolve() for page in first | second}
    assert {page for page in pages() if page != README} <= reached


def linked_files(page: Path) -> set[Path]:
    return {(page.parent / target.partition("#")[0]).resolve() for target in links(page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "report.png").stat().st_size < 300_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page: Path) -> None:
    named = {word for word in code_words(page) if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w/.-]*\w/?", word)}
    assert {word for word in named if not (ROOT / word).exists()} == set()


def test_symbols_that_how_it_is_built_names_exist() -> None:
    text = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)(?:\(\))?` in `([\w/]+\.py)`", text)
    assert named
    for symbol, file in named:
        assert re.search(rf"^(?:def|class) {symbol}\b", (ROOT / file).read_text(), flags=re.MULTILINE), symbol


def test_every_test_that_promises_names_exists() -> None:
    words = [word for word in code_words(ROOT / "docs" / "promises.md") if "test_" in word]
    assert len(words) > 25
    for word in words:
        match = _TEST.fullmatch(word)
        assert match, f"{word} is not of the form tests/FOLDER/test_FILE.py::test_NAME"
        assert (ROOT / match["file"]).is_file(), f"{word}: there is no such file"
        if match["name"]:
            tests = re.findall(r"^def (test_\w+)\(", (ROOT / match["file"]).read_text(), flags=re.MULTILINE)
            assert fnmatch.filter(tests, match["name"].replace("...", "*")), f"{word}: there is no such test"
