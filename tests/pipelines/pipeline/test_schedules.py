"""The schedules of examples/ say what their schedulers understand, and take dinoray's exit codes as they are meant."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from repository import ROOT
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.settings.pipeline_file import read_pipeline

SCHEDULES = ROOT / "examples" / "schedules"


def shell(command: str, folder: Path, exit_code: int) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell whose `dinoray` ends with this code, and whose `logger` says what it is told."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, does in (("dinoray", f'echo "$@"; exit {exit_code}'), ("logger", 'echo "logged: $@"')):
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=30)


def is_a_dinoray_command(command: str) -> bool:
    """Whether the command line takes it: a pipeline that is not there is the first thing wrong with it."""
    program, *arguments = shlex.split(command)
    result = CliRunner().invoke(app, arguments)
    return Path(program).name == "dinoray" and result.exit_code == 2 and ".yaml" in result.stderr


def crontab() -> str:
    (line,) = [line for line in (SCHEDULES / "crontab").read_text().splitlines() if not line.startswith("#")]
    return line


@pytest.mark.parametrize(("code", "logged"), [(0, False), (1, True), (3, True)])
def test_cron(tmp_path: Path, code: int, logged: bool) -> None:
    *times, command = crontab().split(maxsplit=5)
    assert len(times) == 5 and "%" not in command, "cron takes % for the end of a line"
    here = command.replace("/srv/dinoray", str(tmp_path)).replace("/var/log", str(tmp_path))
    done = shell(here.replace(".venv/bin/dinoray", "dinoray"), tmp_path, code)
    assert done.returncode == 0 and (f"logged: -t dinoray nightly ended with {code}" in done.stdout) == logged
    assert (tmp_path / "dinoray.jsonl").read_text() == "run configs/nightly.yaml --json\n"
    asked = command.partition(" && ")[2].partition(" >> ")[0]
    assert is_a_dinoray_command(asked.replace("configs/", "/nowhere/"))


@pytest.mark.parametrize(("code", "succeeds"), [(0, True), (1, False), (2, False), (3, True)])
def test_airflow(tmp_path: Path, code: int, succeeds: bool) -> None:
    """The task's command, as its operator runs it."""
    tree = ast.parse((SCHEDULES / "airflow_dag.py").read_text())
    found = [word.value for word in ast.walk(tree) if isinstance(word, ast.keyword) and word.arg == "bash_command"]
    command = ast.literal_eval(found[0])
    assert (shell(command, tmp_path, code).returncode == 0) == succeeds
    assert is_a_dinoray_command(command.split(" || ")[0])


def test_kubernetes() -> None:
    """A CronJob that creates the RayJob of its ConfigMap, which runs the pipeline of another one."""
    documents = yaml.safe_load_all((SCHEDULES / "kubernetes-cronjob.yaml").read_text())
    cron, config = filter(None, documents)
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    *_, file = container["command"]
    mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    volume = {one["name"]: one["configMap"]["name"] for one in pod["volumes"]}
    assert volume["config"] == config["metadata"]["name"] and str(Path(file).parent) == mounted["config"]
    job = yaml.safe_load(config["data"][Path(file).name])
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert is_a_dinoray_command(job["spec"]["entrypoint"])
    for group in (job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {mount["name"] for one in pod["containers"] for mount in one.get("volumeMounts", ())} <= {
            one["name"] for one in pod.get("volumes", ())
        }


def test_the_nightly_pipeline_is_what_they_run() -> None:
    commands = [job.command for job in read_pipeline(ROOT / "configs" / "nightly.yaml", {}).jobs]
    assert commands == ["extract", "index", "cluster", "cosegment", "correspond", "compact", "report", "verify"]
