"""Counts of how the code is laid out: `python -m benchmarks.structure`, for any checkout with `--at FOLDER`."""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

PREPOSITIONS = ("of", "in", "at", "on", "from", "to", "by", "with", "for", "that", "which", "as", "after", "beside")
SHARED_ROOMS = ("storage", "settings", "sources", "running", "store", "results", "features")
SHARED_FILES = ("cli", "cli_output", "errors", "jobs", "__init__")


def main() -> None:
    """Print the counts, one a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", type=Path, default=Path(__file__).parents[1], help="a checkout; default: this one")
    root = parser.parse_args().at
    files = sorted(path for package in ("dino_ops", "pipelines") for path in (root / package).rglob("*.py"))
    print(f"files in the root of pipelines/: {len(list((root / 'pipelines').glob('*.py')))}")
    print(f"imports from one job into another: {len(list(imports_between_jobs(root)))}")
    print(f"files: {len(files)}, the longest has {max(map(line_count, files))} lines")
    print(f"lines: {sum(map(line_count, files))}")
    length, name = max(function_lengths(files))
    print(f"longest function: {length} lines ({name})")
    fragments = sum(len(list(fragment_comments(path))) for path in files)
    print(f"comments that begin with a preposition: {fragments}")


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def job_of(module: str) -> str:
    """The job that a module of pipelines belongs to; "" for what jobs share.

    Before jobs had folders, a job was the prefix of a file's name.
    """
    first = module.split(".")[1] if "." in module else ""
    if first in SHARED_ROOMS or first in SHARED_FILES:
        return ""
    prefix = first.split("_")[0]
    return {"match": "correspond", "pairs": "correspond", "search": "index", "query": "index"}.get(prefix, prefix)


JOBS = {
    *("extract", "estimate", "cluster", "cosegment", "correspond", "index", "train", "evaluate", "report"),
    *("verify", "compact", "stats", "upkeep", "pipeline"),
}


def imports_between_jobs(root: Path) -> Iterator[str]:
    """Modules of one job that import a module of another one, as "pipelines.a -> pipelines.b"."""
    for path in sorted((root / "pipelines").rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        own = job_of(module)
        if own not in JOBS:
            continue
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipelines"):
                direct = node.module != "pipelines"
                found |= {node.module} if direct else {f"pipelines.{name.name}" for name in node.names}
        for other in sorted(found):
            if job_of(other) in JOBS and job_of(other) != own:
                yield f"{module} -> {other}"


def function_lengths(files: list[Path]) -> Iterator[tuple[int, str]]:
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield (node.end_lineno or 0) - node.lineno + 1, f"{path.name}:{node.name}"


def fragment_comments(path: Path) -> Iterator[str]:
    """Comments behind code that begin with a preposition: they finish the name before them."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        behind_code = token.line[: token.start[1]].strip()
        words = re.match(r"#\s*([a-z]+)\b", token.string) if token.type == tokenize.COMMENT else None
        if behind_code and words and words[1] in PREPOSITIONS:
            yield f"{path}:{token.start[0]}: {token.string}"


if __name__ == "__main__":
    main()
