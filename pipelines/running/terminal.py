"""Printing for people and programs: no secrets, and a stranger's text made safe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from pipelines.running.json_data import json_data
from pipelines.storage.secrets import hidden


def say(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print a text without the secrets in it. file: default: standard output."""
    print(hidden(text), end=end, file=file, flush=True)


def say_json(content: Mapping[str, Any]) -> None:
    """Print an object on a line of its own."""
    print(json.dumps(json_data(content), ensure_ascii=False, allow_nan=False), flush=True)


def warn(sentence: str) -> None:
    """Print a sentence to standard error, on one line."""
    say(f"dinoray: {printable(sentence)}", file=sys.stderr)


def printable(text: str) -> str:
    """A stranger's text, such as a file's name, safe for a terminal: on one line, its control characters spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
