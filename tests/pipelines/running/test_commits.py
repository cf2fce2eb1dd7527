"""Reports wait for the clock, are committed together and in order, and a signal waits for the commit's end."""

from __future__ import annotations

import os
import signal

import pytest

from pipelines.running import commits as waiting_reports
from pipelines.running.commits import LONGEST_WAIT_SHARE_OF_COMMIT_SECONDS, WaitingReports
from pipelines.running.interrupts import interruptible


def test_the_first_one_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    now, commits = 100.0, list[list[str]]()
    monkeypatch.setattr(waiting_reports.time, "monotonic", lambda: now)
    waiting = WaitingReports[str](10 / LONGEST_WAIT_SHARE_OF_COMMIT_SECONDS, commits.append)
    waiting.commit_when_due()
    waiting.commit()
    assert commits == [], "nothing to commit is no commit"
    for at, report in ((100, "a"), (106, "b")):
        now = at
        waiting.add(report)
        waiting.commit_when_due()
    assert commits == []
    now = 110.5
    waiting.commit_when_due()
    assert commits == [["a", "b"]]
    waiting.add("c")
    now = 120
    waiting.commit_when_due()
    assert len(commits) == 1, "the clock begins again with the next one"
    waiting.commit()
    waiting.commit()
    assert commits == [["a", "b"], ["c"]]


def test_a_signal_waits_for_the_end_of_a_commit() -> None:
    done = list[str]()

    def commit(reports: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        done.extend(reports)

    waiting = WaitingReports[str](0, commit)
    waiting.add("a")
    with pytest.raises(KeyboardInterrupt), interruptible():
        waiting.commit()
    assert done == ["a"]
