"""Changes in processes of their own, which die at a numbered step on their way to storage.

delta-rs cannot be used in the child of a process that has used it. So a small server, which has imported everything and
used nothing, forks a child for each trial: `python trials.py` reads requests and writes answers, a line of JSON each.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pipelines.errors import JobError

KILLED = 9  # exit code of a child that died at its step


def storage_steps(*, reads: bool = False) -> list[tuple[Any, str]]:
    """Where this program touches storage, as (owner, name of a function). reads: looks at it too."""
    import faiss
    import pyarrow.parquet as pq
    from deltalake import DeltaTable
    from fsspec.implementations.local import LocalFileSystem
    from s3fs import S3FileSystem

    from pipelines.store import publishing, snapshots
    from pipelines.store.transaction_log import TransactionLog

    found: list[tuple[Any, str]] = [(os, name) for name in ("link", "replace", "unlink", "remove")]
    found += [(LocalFileSystem, "pipe_file"), (pq.ParquetWriter, "close"), (faiss, "write_index")]
    found += [(S3FileSystem, name) for name in ("_pipe_file", "_put_file", "_rm_file")]
    found += [(DeltaTable, "create"), (DeltaTable, "create_write_transaction")]
    if reads:
        found += [(TransactionLog, "listing"), (TransactionLog, "read")]
        found += [(snapshots, "delta_of"), (publishing, "delta_of")]
    return found


@contextmanager
def at_step(number: int, act: Callable[[], object], *, reads: bool = False) -> Iterator[list[str]]:
    """Have `act` called before the step with this number (from 0) is taken; the names of all steps until then, `act`'s
    own left out."""
    taken: list[str] = []
    inside: list[bool] = []

    from s3fs import S3FileSystem

    def before(name: str) -> None:
        if inside:
            return
        taken.append(name)
        if len(taken) == number + 1:
            inside.append(True)
            try:
                act()
            finally:
                inside.pop()

    def disturbed(original: Any, name: str) -> Any:
        @functools.wraps(original)  # drivers are asked for their parameters
        def step(*arguments: Any, **named: Any) -> Any:
            before(name)
            return original(*arguments, **named)

        @functools.wraps(original)
        async def asynchronous_step(*arguments: Any, **named: Any) -> Any:
            # in a thread, since what `act` does waits for this loop
            await asyncio.to_thread(before, name)
            return await original(*arguments, **named)

        return asynchronous_step if inspect.iscoroutinefunction(original) else step

    with ExitStack() as stack:
        stack.callback(S3FileSystem.clear_instance_cache)
        for owner, name in storage_steps(reads=reads):
            original = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, disturbed(original, name)))
        S3FileSystem.clear_instance_cache()  # its instances took hold of their methods when they were made
        yield taken


class Trials:
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
    from small_changes import log_of, put_images

    for images in arguments["images"]:
        log = log_of(arguments)
        put_images(log, images)
        assert not log.messages, log.messages


def _insist(arguments: dict[str, Any]) -> None:
    """As _put, beside sweeps without retention, which may take a file before it is named."""
    from small_changes import log_of, put_images

    for images in arguments["images"]:
        while True:
            try:
                put_images(log_of(arguments), images)
                break
            except (JobError, FileNotFoundError) as error:
                assert "gone" in str(error) or isinstance(error, FileNotFoundError), error


def _compact(arguments: dict[str, Any]) -> None:
    from small_changes import compact, log_of

    for _ in range(arguments.get("times", 1)):
        try:
            compact(log_of(arguments))
        except (JobError, FileNotFoundError):  # what it had merged was swept before it was named
            assert arguments.get("times"), "nobody else is at work"


def _sweep(arguments: dict[str, Any]) -> None:
    from small_changes import log_of, sweep

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
