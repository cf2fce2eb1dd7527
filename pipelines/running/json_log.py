"""Structured logs (--log-json): one JSON object a line on standard error, in place of sentences and the progress line.

Every line has time (ISO 8601, UTC), level, event, command, and run_id from when it is known; most have a message. The
standard library's logging carries them, so that warnings and records of libraries become lines of the same form, and
what anything else prints to standard error becomes one too. Credentials never appear.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from pipelines.running.json_data import json_data
from pipelines.storage.secrets import hidden

LOGGER = logging.getLogger("dinoray")
DECIMALS_OF_NUMBERS = 6


class _Open:
    """The log that is being written, if one is. about: what every line says."""

    about: dict[str, Any] | None = None


@contextlib.contextmanager
def json_log(command: str) -> Iterator[None]:
    """Within: standard error is lines of JSON. What it is afterwards, and the state of logging, is as before."""
    shown = sys.stderr
    # a duplicate, since Ray's start points the descriptor itself elsewhere for a while
    stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8") if shown is sys.__stderr__ else shown
    root, handler = logging.getLogger(), _Lines(stream)
    before, level = root.handlers, LOGGER.level
    root.handlers = [handler]
    LOGGER.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # else every step of a bar would be a line
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _Open.about = {"command": command}
    printed = _Printed()
    sys.stderr = printed
    try:
        yield
    finally:
        printed.finish()
        sys.stderr = shown
        logging.captureWarnings(False)
        root.handlers = before
        LOGGER.setLevel(level)
        _Open.about = None
        if stream is not shown:
            stream.close()


def active() -> bool:
    return _Open.about is not None


@contextlib.contextmanager
def about(**said: Any) -> Iterator[None]:
    """Within: every line says this too, such as run_id."""
    outside = _Open.about
    if outside is not None:
        _Open.about = outside | said
    try:
        yield
    finally:
        if outside is not None:
            _Open.about = outside


def event(name: str, message: str = "", /, *, level: int = logging.INFO, **fields: Any) -> None:
    """Write a line; outside of `json_log` nothing."""
    if active():
        LOGGER.log(level, "%s", message, extra={"event": name, "fields": fields})


def failed(message: str, exit_code: int) -> None:
    """The line of an error that has a sentence."""
    event("failed", message, level=logging.ERROR, exit_code=exit_code)


def broke(error: Exception) -> None:
    """The line of a bug, whose traceback is a field."""
    fields = {"error": type(error).__name__, "exit_code": 1, "traceback": "".join(traceback.format_exception(error))}
    event("failed", f"{type(error).__name__}: {error}", level=logging.CRITICAL, **fields)


def finished(content: Mapping[str, Any], **more: Any) -> None:
    """The line of a job's end: the numbers of its result, named as --json names them; seconds: the whole run's."""
    words = {key: content[key] for key in ("run_id", "name", "device", "kind") if content.get(key)}
    numbers = {key: value for key, value in content.items() if isinstance(value, bool | int | float)}
    seconds = content.get("seconds")
    if isinstance(seconds, Mapping) and "total" in seconds:
        numbers["seconds"] = seconds["total"]
    status = content.get("status", "done")
    event("finished", **{"status": status, "exit_code": 0} | words | numbers | more)


class _Lines(logging.Handler):
    """Writes each record as a line."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=self._stream, flush=True)
        except Exception:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        time = dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": getattr(record, "event", "message")}
        line |= _Open.about or {}
        if message := " ".join(record.getMessage().split()):
            line["message"] = message
        if record.name != LOGGER.name:
            line["logger"] = record.name
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        content = json_data(line | getattr(record, "fields", {}), decimals=DECIMALS_OF_NUMBERS)
        return json.dumps(content, ensure_ascii=False, allow_nan=False, default=lambda other: hidden(str(other)))


class _Printed(io.TextIOBase):
    """Standard error for everything else: a line that is printed becomes a line of JSON."""

    def __init__(self) -> None:
        self._unfinished_line = ""

    def write(self, text: str) -> int:
        *lines, self._unfinished_line = re.split(r"[\r\n]", self._unfinished_line + text)
        for line in lines:
            if line.strip():
                event("message", line)
        return len(text)

    def writable(self) -> bool:
        return True

    def finish(self) -> None:
        self.write("\n")
