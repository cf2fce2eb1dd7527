"""The command line: what it prints where, what it loads, and its exit codes."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from hand_made import finished_store
from small_runs import as_options, settings
from typer.testing import CliRunner, Result

from pipelines import cli
from pipelines.cli import app
from pipelines.upkeep import verify

DINORAY = str(Path(sys.executable).with_name("dinoray"))
COMMANDS = ("extract", "index", "search", "verify", "stats", "settings")


def dinoray(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def only_object(result: Result) -> dict[str, Any]:
    """The one JSON object that standard output is."""
    assert result.stdout.count("\n") == 1
    content = json.loads(result.stdout)
    assert isinstance(content, dict)
    return content


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder and when it was last written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def done(photos: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """INPUT, and a STORE in which all of it is done."""
    source, store = photos(3), tmp_path / "store"
    finished_store(source, store, settings())
    return source, store


@pytest.mark.parametrize("arguments", [["--help"], ["extract", "--help"], ["evaluate", "pck", "--help"], ["settings"]])
def test_help_loads_no_heavy_package(arguments: list[str]) -> None:
    program = f"""
import sys
from pipelines import cli
from pipelines.cli import app
app({arguments!r}, standalone_mode=False)
heavy = {{"torch", "ray", "pyarrow", "pandas", "numpy", "timm", "deltalake", "fsspec", "scipy", "faiss"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_help_is_quick() -> None:
    """0.5 s are allowed; the limit here leaves room for a busy machine."""
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([DINORAY, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - started)
    assert statistics.median(seconds) < 1.5


def test_help_names_every_command() -> None:
    result = dinoray("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command: str) -> None:
    result = dinoray(command, "--help")
    assert result.exit_code == 0
    common = {"--config", "--set", "--json"} | ({"--dry-run"} if command != "settings" else set())
    own = {"--prune", "--retry-failed", "--limit"} if command == "extract" else set()
    for option in common | own:
        assert option in result.stdout


def test_no_arguments_show_the_help() -> None:
    assert "Usage" in dinoray().output


@pytest.mark.parametrize(
    "typed, offered",
    [
        (["dinoray", "c"], {"cluster", "compact", "correspond", "cosegment"}),
        (["dinoray", "evaluate", "p"], {"pck", "parts"}),
        (["dinoray", "extract", "--dry"], {"--dry-run"}),
    ],
)
def test_a_shell_completes_commands_and_options(typed: list[str], offered: set[str]) -> None:
    environment = os.environ | {
        "_DINORAY_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - 1),
    }
    command = [Path(sys.executable).with_name("dinoray")]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert set(completed.stdout.split()) == offered


def test_settings_show_every_setting_with_its_value() -> None:
    result = dinoray("settings", "--set", "features.stride=4")
    assert result.exit_code == 0
    assert "  stride: 4\n" in result.stdout and "  shorter_side: 224\n" in result.stdout


def test_settings_as_json_are_the_settings() -> None:
    content = only_object(dinoray("settings", "--json", "--set", "features.stride=4"))
    assert content["features"]["stride"] == 4 and content["model"]["name"] == "dino_vits16"


def test_settings_never_show_secrets() -> None:
    for option in ((), ("--json",)):
        assert "hush" not in dinoray("settings", *option, "--set", "storage.options.secret=hush").output


SECRET_URI = "s3://key:hush-hush@bucket/a.parquet"


@pytest.mark.parametrize("option", [["--json"], []])
@pytest.mark.parametrize(
    "command",
    [
        ["settings", "--set", f"model.weights={SECRET_URI}"],
        ["verify", "store", "--dry-run", "--set", f"model.weights={SECRET_URI}"],
        ["verify", SECRET_URI, "--dry-run"],
        ["stats", "https://host/a?sig=hush-hush", "--dry-run"],
        ["verify", "store", "--dry-run", "--set", "storage.options.secret=hush-hush"],
        ["verify", "hush-hush", "--dry-run", "--set", "storage.options.secret=hush-hush"],
    ],
    ids=" ".join,
)
def test_no_command_shows_a_secret(command: list[str], option: list[str]) -> None:
    result = dinoray(*command, *option)
    assert result.exit_code == 0 and "..." in result.stdout and "hush-hush" not in result.output


@pytest.mark.parametrize(
    "mistake",
    [
        ["verify", "store", "storage.options.secret=hush-hush"],
        ["verify", "store", SECRET_URI],
        ["storage.options.secret=hush-hush"],
    ],
    ids=" ".join,
)
def test_arguments_that_cannot_be_parsed_show_no_secret(mistake: list[str]) -> None:
    """Such as those of a --set that was forgotten."""
    result = dinoray(*mistake)
    assert result.exit_code == 2 and "..." in result.output and "hush" not in result.output


@pytest.mark.parametrize("option", [["--json"], []])
def test_what_a_job_found_is_shown_without_secrets(option: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = verify.Result("r", "s3://key:hush-hush@bucket", problems=["hush-hush has no rows"], messages=[SECRET_URI])
    monkeypatch.setattr(verify, "run", lambda *arguments, **more: found)
    result = dinoray("verify", "store", "--set", "storage.options.secret=hush-hush", *option)
    assert "... has no rows" in result.stdout and "hush-hush" not in result.output


def test_commands_print_in_no_way_that_would_show_secrets() -> None:
    """cli.py prints nothing itself: what it says goes through functions that hide."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(cli))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_numbers_that_json_does_not_have_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verify.Result("r", "store", seconds={"total": float("nan"), "read": float("inf")})
    monkeypatch.setattr(verify, "run", lambda *arguments, **more: found)
    content = json.loads(dinoray("verify", "store", "--json").stdout, parse_constant=pytest.fail)
    assert content["seconds"] == {"total": None, "read": None}


def test_extract_with_nothing_left_ends_with_0_and_says_where_the_tables_are(done: tuple[Path, Path]) -> None:
    source, store = done
    result = dinoray("extract", source, store, *as_options())
    assert result.exit_code == 0
    assert "3 images in INPUT, 3 were done, 0 extracted" in result.stdout
    assert f"{store}/images" in result.stdout and f"{store}/runs/" in result.stdout


def test_extract_as_json_prints_one_object(done: tuple[Path, Path]) -> None:
    source, store = done
    (source / "notes.txt").write_text("skipped")
    result = dinoray("extract", source, store, "--json", *as_options())
    content = only_object(result)
    assert (content["status"], content["listed"], content["already_done"], content["exit_code"]) == ("done", 3, 3, 0)
    assert "1 .txt" in result.stderr


def test_verify_and_stats_as_json_print_one_object(done: tuple[Path, Path]) -> None:
    _, store = done
    checked = only_object(dinoray("verify", store, "--json"))
    assert (checked["sound"], checked["images"], checked["patches"]) == (True, 3, 36)
    counted = only_object(dinoray("stats", store, "--json"))
    assert (counted["images"], counted["patches"], counted["labels"]) == (3, 36, 2)


def test_stats_print_rows_and_runs(done: tuple[Path, Path]) -> None:
    source, store = done
    dinoray("extract", source, store, *as_options())
    result = dinoray("stats", store)
    assert result.exit_code == 0
    for part in ("images", "patches", "failures", "vit_tiny_patch16_224", "runs", "done"):
        assert part in result.stdout


def test_a_damaged_store_as_json_is_one_object_and_exit_code_1(done: tuple[Path, Path]) -> None:
    _, store = done
    next((store / "patches").glob("*.parquet")).unlink()
    result = dinoray("verify", store, "--json")
    assert result.exit_code == 1
    content = only_object(result)
    assert not content["sound"] and "missing" in content["problems"][0]


@pytest.mark.parametrize("command", ["extract", "verify", "stats", "settings"])
def test_a_mistake_as_json_is_one_object_with_the_sentence(command: str, tmp_path: Path) -> None:
    places = {"extract": [tmp_path / "in", tmp_path / "store"], "settings": []}.get(command, [tmp_path / "store"])
    result = dinoray(command, *places, "--json", "--set", "features.strid=4")
    assert result.exit_code == 2
    assert only_object(result) == {
        "error": "Unknown setting features.strid: did you mean features.stride?",
        "exit_code": 2,
    }
    assert result.stderr == "dinoray: Unknown setting features.strid: did you mean features.stride?\n"


def test_a_dry_run_prints_settings_and_plan_and_writes_nothing(photos: Callable[..., Path], tmp_path: Path) -> None:
    source, store = photos(3), tmp_path / "store"
    result = dinoray("extract", source, store, "--dry-run", *as_options("features.stride=8"))
    assert result.exit_code == 0
    assert "stride: 8" in result.stdout and "name: vit_tiny_patch16_224" in result.stdout
    assert "3 images listed: 3 to extract" in result.stdout and "Nothing was written" in result.stdout
    assert not store.exists()


def test_a_dry_run_on_a_store_counts_what_is_left_and_writes_nothing(done: tuple[Path, Path]) -> None:
    source, store = done
    (source / "dog" / "0000.jpg").write_bytes(b"changed")
    (source / "new.jpg").write_bytes(b"new")
    before = tree(store)
    content = only_object(dinoray("extract", source, store, "--dry-run", "--json", *as_options()))
    assert (content["status"], content["pending"], content["changed"], content["already_done"]) == ("dry_run", 2, 1, 2)
    assert content["settings"]["model"]["name"] == "vit_tiny_patch16_224"
    assert tree(store) == before


@pytest.mark.parametrize("command", ["verify", "stats"])
def test_a_dry_run_of_a_reading_command_says_what_it_would_read(command: str, done: tuple[Path, Path]) -> None:
    _, store = done
    before = tree(store)
    shown = dinoray(command, store, "--dry-run")
    assert shown.exit_code == 0 and f"would {'read' if command == 'stats' else command} {store}" in shown.stdout
    content = only_object(dinoray(command, store, "--dry-run", "--json"))
    assert content.keys() == {"settings", "would"}
    assert tree(store) == before


def test_configuration_files_and_overrides_reach_the_job(done: tuple[Path, Path], tmp_path: Path) -> None:
    source, store = done
    file = tmp_path / "settings.yaml"
    file.write_text("image:\n  shorter_side: 32\n")
    from_file = dinoray("extract", source, store, *as_options()[:4], "-c", file)
    assert from_file.exit_code == 2 and "requested 32" in from_file.stderr
    overridden = dinoray("extract", source, store, *as_options(), "-c", file)
    assert overridden.exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [["--limit", "0"], ["--limit", "-1"], ["--limit", "few"], ["--unknown"]],
)
def test_an_option_that_does_not_fit_is_refused(arguments: list[str], photos: Callable[..., Path]) -> None:
    source = photos(1)
    result = dinoray("extract", source, source.parent / "store", *arguments)
    assert result.exit_code == 2 and arguments[0] in result.stderr
    assert result.stdout == "" and not (source.parent / "store").exists()


def test_a_missing_argument_is_refused() -> None:
    result = dinoray("extract", "photos")
    assert result.exit_code == 2 and "STORE" in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("pipelines.settings.loading.load_config", broken)
    assert isinstance(dinoray("settings").exception, TypeError)


@pytest.mark.usefixtures("extract_here")
def test_more_failures_than_allowed_end_with_3(photos: Callable[..., Path], tmp_path: Path) -> None:
    source, store = photos(1), tmp_path / "store"
    (source / "broken.jpg").write_bytes(b"this is not an image")
    result = dinoray("extract", source, store, "--json", *as_options())
    content = only_object(result)
    assert (result.exit_code, content["exit_code"], content["extracted"], content["failed"]) == (3, 3, 1, 1)
    assert "1 of 2 images failed" in result.stderr and "run.max_failed_fraction" in result.stderr
    again = dinoray("extract", source, store, *as_options())
    assert again.exit_code == 0, "failures that are recorded are not counted again"
    assert "1 failed before and was not tried again" in again.stdout


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """dinoray in a process group of its own, as a terminal starts it."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [DINORAY, *(str(argument) for argument in arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def interrupt(process: subprocess.Popen[str], kind: signal.Signals) -> None:
    """As Ctrl-C does, to the whole group; as schedulers do, to the process."""
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)
    else:
        process.send_signal(kind)


def committed(store: Path) -> list[dict[str, Any]]:
    """Which images are done, and which run did them; empty for a store that is not there yet."""
    if not DeltaTable.is_deltatable(str(store / "images")):
        return []
    return DeltaTable(store / "images").to_pyarrow_table(columns=["image_id", "run_id"]).to_pylist()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_interrupted_runs_keep_what_they_committed_and_the_next_one_finishes(
    photos: Callable[..., Path], tmp_path: Path
) -> None:
    source, store = photos(48), tmp_path / "store"
    options = as_options("image.shorter_side=192", "run.images_per_shard=1", "run.commit_seconds=1")
    kept: list[dict[str, Any]] = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        with running("extract", source, store, "--json", *options) as process:
            until = time.monotonic() + 120
            while len(committed(store)) <= len(kept) and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            interrupt(process, kind)
            stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert json.loads(stdout)["status"] == "interrupted"
        assert "what is committed stays" in stderr and "Traceback" not in stderr
        assert all(row in committed(store) for row in kept)
        assert len(kept) < len(committed(store)) < 48
        kept = committed(store)
    finished = dinoray("extract", source, store, *options)
    assert finished.exit_code == 0, finished.stderr
    assert len(committed(store)) == 48 and all(row in committed(store) for row in kept)
    assert verify.run(settings(), store=str(store)).problems == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_before_the_job_begins_ends_with_130(kind: signal.Signals, tmp_path: Path) -> None:
    pipe = tmp_path / "settings.yaml"
    os.mkfifo(pipe)
    with running("settings", "--json", "-c", pipe) as process, pipe.open("w"):  # opens once dinoray reads
        interrupt(process, kind)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert json.loads(stdout) == {"error": "interrupted", "exit_code": 130}
    assert stderr == "dinoray: interrupted.\n"
