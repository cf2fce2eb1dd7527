"""verify: does a store hold what it says? Every images row has all its patches, no patch lacks its image, files and
logs agree, dimensions match the spec; every match has its pair; every index has its files, and the table's images."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipelines.running.reports import JobResult, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.findings import shown
from pipelines.store.store import Store
from pipelines.upkeep.checking import Checked, check

MOST_PROBLEMS_OF_A_KIND = 20


@dataclass
class Result(JobResult):
    """What verify found.

    problems: damage, a sentence each. messages: what is worth knowing and harmless. unreferenced_files: left by killed
    or replaced writes; they are harmless, and `compact` removes them.
    """

    images: int = 0
    patches: int = 0
    failures: int = 0
    files: int = 0
    unreferenced_files: int = 0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"sound": not self.problems}


def run(config: Config, *, store: str, deep: bool = False) -> Result:
    """Check a store; reads every row of images, and the keys and descriptors of patches.

    deep: read every page of every table, and compare it with its checksum. Files written before 0.1.0 had checksums
    have none; what is damaged there is found where it cannot be unpacked.

    Raises:
        RequestError: there is no store.
        JobError: a file cannot be reached, or may not be read, so that nobody can say whether it is damaged.
    """
    started = time.monotonic()
    opened = Store.open(store, config)
    result = Result(new_run_id(), opened.uri)
    with recorded(None, result, started):
        checked = check(opened, deep=deep)
        result.problems += shown(checked.findings, MOST_PROBLEMS_OF_A_KIND)
        for name in ("images", "patches", "failures", "files", "unreferenced_files"):
            setattr(result, name, getattr(checked, name))
        result.messages += [*_about_unfinished(checked), *checked.notes]
        result.exit_code = 1 if result.problems else 0
    return result


def _about_unfinished(checked: Checked) -> list[str]:
    if checked.unfinished is None:
        return []
    return [
        f"Transaction {checked.unfinished.number} ({checked.unfinished.command}) is not completed: its writer is at "
        "work, or was killed, and then the next command that writes completes it."
    ]
