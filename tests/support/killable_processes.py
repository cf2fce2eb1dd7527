"""Changes in processes of their own, which die at a numbered step on their way to storage.

delta-rs cannot be used in the child of a process that has used it. So a small server, which has imported everything and
used nothing, forks a child for each trial: `python killable_processes.py` reads requests and writes answers, a line of
JSON each.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage_steps import at_step, storage_steps

from pipelines.errors import JobError

KILLED = 9  # exit code of a child that died at its step


class KillableProcesses:
    """The server, from the side of the tests."""

    def __init__(self) -> None:
        support = Path(__file__).parent
        paths = [str(support), str(support.parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def prepare_jobs(self) -> None:
        """Have the server import what jobs take, so that no child has to."""
        self._ask({"import": "simulated_jobs"})

    def start(self, change: str, **arguments: Any) -> int:
        """Begin a change of CHANGES in a process of its own; its id. die_at: the step before which it dies."""
        return self._ask({"start": change, "arguments": arguments})

    def wait(self, child: int) -> int:
        """The exit code: 0, KILLED, or 1 for an error, which is shown."""
        return self._ask({"wait": child})

    def run(self, change: str, **arguments: Any) -> int:
        return self.wait(self.start(change, **arguments))

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _put(arguments: dict[str, Any]) -> None:
    from two_table_store import log_of, put_images

    for images in arguments["images"]:
        log = log_of(arguments)
        put_images(log, images)
        assert not log.messages, log.messages


def _insist(arguments: dict[str, Any]) -> None:
    """As _put, beside sweeps without retention, which may take a file before it is named."""
    from two_table_store import log_of, put_images

    for images in arguments["images"]:
        while True:
            try:
                put_images(log_of(arguments), images)
                break
            except (JobError, FileNotFoundError) as error:
                assert "gone" in str(error) or isinstance(error, FileNotFoundError), error


def _compact(arguments: dict[str, Any]) -> None:
    from two_table_store import compact, log_of

    for _ in range(arguments.get("times", 1)):
        try:
            compact(log_of(arguments))
        except (JobError, FileNotFoundError):  # what it had merged was swept before it was named
            assert arguments.get("times"), "nobody else is at work"


def _sweep(arguments: dict[str, Any]) -> None:
    from two_table_store import log_of, sweep

    for _ in range(arguments.get("times", 1)):
        sweep(log_of(arguments))


def _command(arguments: dict[str, Any]) -> None:
    from store_commands import COMMANDS

    COMMANDS[arguments["command"]](arguments["store"])


def _job(arguments: dict[str, Any]) -> None:
    """A job of simulated_jobs, as its command runs it."""
    from simulated_jobs import JOBS, Place, extract_from, jobs_in_process

    name, place = arguments["job"], Place(arguments["store"], arguments["inputs"])
    with jobs_in_process():
        result = (JOBS[name] if name in JOBS else extract_from(name.removeprefix("extract ")))(place)
    assert result.exit_code == 0


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "command": _command,
    "job": _job,
    "put": _put,
    "insist": _insist,
    "compact": _compact,
    "sweep": _sweep,
}


def _child(change: str, arguments: dict[str, Any]) -> None:
    try:
        with at_step(arguments.get("die_at", -1), lambda: os._exit(KILLED)):
            CHANGES[change](arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _serve() -> None:
    # before any fork, since what it imports must not be imported in many children
    importlib.import_module("store_commands")
    storage_steps()
    for line in sys.stdin:
        request = json.loads(line)
        if "import" in request:
            importlib.import_module(request["import"])
            answer = 0
        elif "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(request["start"], request["arguments"])
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
