"""How a training went, as files: log/*.jsonl, one JSON object a line, and tensorboard/.

A segment of the log is named by the step that it begins after, and is written again every little while, since nothing
can be appended on object storage. A training that continues from a checkpoint first takes away what was logged after
it, so that no step is there twice.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from typing import Any

from pipelines import storage

WRITE_SECONDS = 20.0


class TrainingLog:
    """The log of a training that starts, or continues after `step` steps. Only one process writes it."""

    def __init__(self, output: str, step: int, options: storage.Options) -> None:
        from pipelines.train.tensorboard import EventFile

        self._output, self._options = output, options
        truncate_log(output, step, options)
        self._first_step = step
        self._lines: list[str] = []
        self._written_at = time.monotonic()
        self._remote = None if storage.is_local(output) else storage.join(output, "tensorboard")
        self._folder = tempfile.mkdtemp() if self._remote else os.path.join(output, "tensorboard")
        self._events = EventFile(self._folder, step)

    def add(self, record: dict[str, Any]) -> None:
        """Note a record; it has `step`, numbers become curves."""
        self._lines.append(json.dumps(record))
        self._events.add(record)
        if time.monotonic() - self._written_at >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Bring everything to OUTPUT. Raises OSError, or JobError for a storage out of reach."""
        self._written_at = time.monotonic()
        if self._lines:
            content = "".join(f"{line}\n" for line in self._lines).encode()
            storage.write_bytes(_segment_uri(self._output, self._first_step), content, self._options)
        self._events.flush()
        if self._remote:
            for name in os.listdir(self._folder):
                with open(os.path.join(self._folder, name), "rb") as file:
                    storage.write_bytes(storage.join(self._remote, name), file.read(), self._options)

    def start_segment(self, step: int) -> None:
        """What comes after `step` steps goes into a file of its own; called where there is a checkpoint."""
        self.write()
        if self._lines:
            self._first_step, self._lines = step, []

    def close(self) -> None:
        """Write what is left. Raises as `write` does."""
        try:
            self.write()
            self._events.close()
        finally:
            if self._remote:
                shutil.rmtree(self._folder, ignore_errors=True)


def read_log(output: str, options: storage.Options) -> list[dict[str, Any]]:
    """All records, in order of their steps."""
    fs, path = storage.filesystem(storage.join(output, "log"), options)
    records: list[dict[str, Any]] = []
    for name in _segments(fs, path):
        records += [json.loads(line) for line in fs.cat_file(name).decode().splitlines()]
    return sorted(records, key=lambda record: record["step"])


def truncate_log(output: str, step: int, options: storage.Options) -> None:
    """Take away what was logged after the checkpoint of `step` steps; an accuracy is found after its checkpoint."""
    fs, path = storage.filesystem(storage.join(output, "log"), options)
    for name in _segments(fs, path):
        lines = fs.cat_file(name).decode().splitlines()
        kept = [line for line in lines if _is_before(json.loads(line), step)]
        if not kept:
            fs.rm_file(name)
        elif len(kept) < len(lines):
            uri = storage.join(output, "log", name.rsplit("/", 1)[-1])
            storage.write_bytes(uri, "".join(f"{line}\n" for line in kept).encode(), options)


def _is_before(record: dict[str, Any], step: int) -> bool:
    return record["step"] < step or (record["step"] == step and "loss" in record)


def _segment_uri(output: str, first_step: int) -> str:
    return storage.join(output, "log", f"from-{first_step:08}.jsonl")


def _segments(fs: Any, path: str) -> list[str]:
    try:
        return sorted(name for name in fs.ls(path, detail=False) if name.endswith(".jsonl"))
    except FileNotFoundError:
        return []
