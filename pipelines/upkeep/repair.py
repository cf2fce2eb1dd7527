"""repair: mends what verify finds, or removes rows so that the commands that made them make them again, or says what
else can be done. It never invents rows.

Files are judged before rows, so this goes in rounds: check everything, mend what was found, and check again, until
nothing is found that can be mended. Every change is a transaction, so that a run can be killed at any moment and be
started beside others; the same command again goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipelines.running.interrupts import interruptible
from pipelines.running.progress import StatusLine
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.findings import ByHand, Finding, Publish
from pipelines.store.store import Store
from pipelines.store.transaction_log import FOLDER
from pipelines.upkeep.checking import Checked, check
from pipelines.upkeep.mending import Mender, commands_after

MOST_ROUNDS = 8


@dataclass
class Result(JobResult):
    """What repair found and did, or would do.

    found: how many findings; mended: how many of them are mended. mends: what was wrong and what was done, a sentence
    each. removed: rows that went, by table. commands: that make again what was removed. left: what nothing here can
    mend, and what can be done.
    """

    found: int = 0
    mended: int = 0
    mends: list[str] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"sound": not self.left and self.status != "dry_run"}


def run(config: Config, *, store: str, dry_run: bool = False) -> Result:
    """Repair a store; reads every page of every table. Exit code 1 where something is left that it cannot mend.

    Raises:
        RequestError: there is no store.
        JobError: store.json is damaged, the disk is full, or a file cannot be reached or may not be read.
    """
    started = time.monotonic()
    opened = Store.open(store, config)
    result = Result(new_run_id(), opened.uri)
    if dry_run:
        findings = _found(check(opened, deep=True))
        _tell(result, opened, findings)
        if result.mends:
            result.messages.append("Rows are judged when files are whole, so that more may come up then.")
        return result.ended("dry_run", started)
    report = RunReport("repair", opened.uri, config, result.run_id, {})
    with (
        recorded(report, result, started, told=opened.log.messages, fingerprint=opened.fingerprint),
        interruptible(),
        StatusLine() as line,
    ):
        _repair(opened, result, line)
        if not result.mended and not result.left:
            result.status = "unchanged"
    return result


def _repair(opened: Store, result: Result, line: StatusLine) -> None:
    before: list[Finding] = []
    for number in range(1, MOST_ROUNDS + 1):
        line.show(f"checking everything (round {number})")
        findings = _found(check(opened, deep=True))
        mendable = [one for one in findings if not isinstance(one.mend, ByHand)]
        if not mendable or findings == before or number == MOST_ROUNDS:
            _leave(result, findings)
            return
        line.show(f"mending what was found ({len(mendable):,})")
        _tell(result, opened, mendable)
        mender = Mender(opened, result.run_id)
        mender.mend([one.mend for one in mendable])
        for table, count in mender.removed.items():
            result.removed[table] = result.removed.get(table, 0) + count
        before, opened = findings, Store.open(opened.uri, opened.config)


def _found(checked: Checked) -> list[Finding]:
    """Everything that is to be mended, each thing once."""
    findings = list(dict.fromkeys(checked.findings))
    if checked.unfinished is not None:
        one = checked.unfinished
        path = f"{FOLDER}/{one.number:020}.json"
        findings.append(Finding("transaction", path, f"Transaction {one.number} is not completed", Publish()))
    return findings


def _tell(result: Result, store: Store, findings: list[Finding]) -> None:
    """Say what is done about findings, and about those for which nothing is."""
    _leave(result, [one for one in findings if isinstance(one.mend, ByHand)])
    mendable = [one for one in findings if not isinstance(one.mend, ByHand)]
    result.found += len(mendable)
    result.mended += len(mendable)
    result.mends += [f"{one.sentence.rstrip('.')}: {one.remedy}." for one in mendable]
    for command in commands_after(store, mendable):
        if command not in result.commands:
            result.commands.append(command)


def _leave(result: Result, findings: list[Finding]) -> None:
    result.found += len(findings)
    result.left += [f"{one.sentence.rstrip('.')}: {one.remedy}." for one in findings]
    result.exit_code = 1 if result.left else 0
