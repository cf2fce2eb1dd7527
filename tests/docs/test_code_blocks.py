"""Every code block of README.md and docs/ does what it shows: Python runs, and commands and settings exist."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from documents import ROOT, Block, blocks, code_words, dinoray_arguments, pages, shell_lines

from pipelines import cli
from pipelines.settings.loading import load_config
from pipelines.settings.pipeline_file import read_pipeline
from pipelines.settings.sections import Config

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
YAML = [block for block in BLOCKS if block.language == "yaml"]
LABELS = ("animal", "machine", "person", "scene", "table", "texture")
COMMANDS = [(page.name, line) for page in PAGES for line in shell_lines(page) if dinoray_arguments(line) is not None]
FILE_ENDINGS = ("json", "html", "md", "png")


def title(block: Block) -> str:
    return f"{block.page}, {block.section}"


def test_there_is_nothing_else_than_what_is_tested_here() -> None:
    assert {block.language for block in BLOCKS} <= {"python", "yaml", "bash", "sh", "shell", "diff"}
    (diff,) = [block for block in BLOCKS if block.language == "diff"]
    assert diff.page == "docs/how-it-is-built.md", "tests/pipelines/test_adding_a_job.py applies it"
    assert len(PYTHON) > 10 and len(COMMANDS) > 40
    assert any("import dinoray" in block.code for block in PYTHON)


@pytest.mark.parametrize("block", [block for block in PYTHON if "import dinoray" not in block.code], ids=title)
def test_python_runs_as_shown(
    documented: Path, block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, since each of them imports the same libraries."""
    monkeypatch.chdir(documented)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
        exec(compile(block.code, title(block), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert any(label in printed for label in LABELS), printed


@pytest.mark.parametrize("block", [block for block in PYTHON if "import dinoray" in block.code], ids=title)
def test_python_with_dinoray_runs_as_shown(documented: Path, block: Block) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block.code],
        cwd=documented, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_accepted(page: str, line: str) -> None:
    """By the parser of the command line, settings included; nothing runs."""
    arguments = dinoray_arguments(line)
    assert arguments
    command: Any = typer.main.get_command(cli.app)
    name = "dinoray"
    while hasattr(command, "commands"):
        name, arguments = arguments[0], arguments[1:]
        assert name in command.commands, f"{line}: there is no command {name}"
        command = command.commands[name]
    try:
        command.make_context(name, list(arguments))
    except click.exceptions.ClickException as error:
        pytest.fail(f"{line}: {error.format_message()}")
    following = list(itertools.pairwise(arguments))
    files = [ROOT / value for option, value in following if option in ("-c", "--config")]
    load_config(files, [value for option, value in following if option == "--set"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page: Path) -> None:
    known = {*typer.main.get_command(cli.app).commands, "COMMAND"}
    called = {word.split()[1] for word in code_words(page) if re.match(r"dinoray [\w]", word)}
    assert called <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_text_exist(page: Path) -> None:
    known = {f"{name}.{key}" for name, about in Config.model_fields.items() for key in about.annotation.model_fields}
    pattern = re.compile(rf"(?:--set )?((?:{'|'.join(Config.model_fields)})\.([a-z_]+))")
    named = [match for word in code_words(page) if (match := pattern.match(word)) and match[2] not in FILE_ENDINGS]
    assert {match[1] for match in named} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_and_extras_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = [*shell_lines(page), *code_words(page)]
    makes = {match[1] for line in shown if (match := re.match(r"make (?:[A-Z]+=\S+ )?([a-z-]+)", line))}
    wanted = {match[1] for line in shown if (match := re.match(r"pip install \"(?:dinoray|\.)\[(\w+)\]", line))}
    assert makes <= targets and wanted <= set(extras)


@pytest.mark.parametrize("block", YAML, ids=title)
def test_yaml_is_a_pipeline_or_settings(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(block.code)
    if "jobs" in yaml.safe_load(block.code):
        assert read_pipeline(file, {}).jobs
    else:
        load_config([file])


def test_configurations_load_and_open_with_their_command() -> None:
    for file in (ROOT / "configs").glob("*.yaml"):
        if file.name == "nightly.yaml":  # a pipeline, with settings inside
            read_pipeline(file, {})
        else:
            load_config([file])
        assert file.read_text().splitlines()[2].startswith("#   dinoray "), file.name
