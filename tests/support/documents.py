"""The documentation as data: code blocks, commands, links and headings of README.md and docs/*.md."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

SHELLS = ("bash", "sh", "shell")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A code block. page: path below the repository. section: the heading above it."""

    page: str
    section: str
    language: str
    code: str


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        headings = re.findall(r"^#+ (.+)$", text[: match.start()], flags=re.MULTILINE)
        found.append(Block(str(page.relative_to(ROOT)), headings[-1], match[1], match[2]))
    return found


def python_of_section(page: str, section: str) -> str:
    """The first Python block of a section of a page below the repository."""
    found = [one.code for one in blocks(ROOT / page) if (one.section, one.language) == (section, "python")]
    assert found, f"{page} has no Python below {section!r}"
    return found[0]


def shell_lines(page: Path) -> list[str]:
    """Every line of the indented and shell blocks of a page; a line that ends with a backslash goes on in the next."""
    text = page.read_text(encoding="utf-8")
    code = [one.code for one in blocks(page) if one.language in SHELLS]
    indented = re.findall(r"^    (\S.*)$", _FENCE.sub("", text), flags=re.MULTILINE)
    joined = "\n".join([*code, *indented]).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


def dinoray_arguments(line: str) -> list[str] | None:
    """What a shell line gives to dinoray; None for a line that does not call it."""
    words = shlex.split(line, comments=True)
    while words and _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    if words[:1] != ["dinoray"]:
        return None
    ends = [at for at, word in enumerate(words) if re.fullmatch(r"\||\d?>>?|&&", word)]
    return words[1 : min(ends, default=len(words))]


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page that lead into the repository."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+://", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_words(page: Path) -> list[str]:
    """What stands in backticks in the text of a page."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text(encoding="utf-8")))
