"""Every interleaving of small companies of processes, and rules broken on purpose to see that it would show."""

from __future__ import annotations

import time
from typing import Any

import pytest
from protocol_model import Rules, Violation, explore

SET_A, SET_B, SET_C = ("set", "a", 1), ("set", "b", 1), ("set", "c", 1)
DROP_A, SWEEP, READ = ("drop", "a"), ("sweep",), ("read",)
START = {"f": [("a", 0), ("b", 0)], "g": [("c", 0)]}  # an old a beside b, and c
COMPACT = ("compact", ("f", "g"), (("a", 0), ("b", 0), ("c", 0)))

COMPANIES: dict[str, dict[str, Any]] = {
    "two add": {"goals": [[SET_A], [SET_B]], "kills": 2},
    "two add the same": {"goals": [[SET_A], [SET_A]], "kills": 2},
    "two add, answers are lost": {"goals": [[SET_A], [SET_B]], "kills": 1, "losses": 1},
    "two replace neighbours": {"goals": [[SET_A], [SET_B]], "start": START, "kills": 2},
    "one replaces what one removes": {"goals": [[SET_A], [DROP_A]], "start": START, "kills": 2},
    "compact beside one that replaces": {"goals": [[SET_A], [COMPACT]], "start": START, "kills": 2, "losses": 1},
    "compact beside one that removes": {"goals": [[DROP_A], [COMPACT]], "start": START, "kills": 2},
    "two compact": {"goals": [[COMPACT], [COMPACT]], "start": START, "kills": 2},
    "sweep beside one that replaces": {"goals": [[SET_A], [SWEEP]], "start": START, "kills": 2, "losses": 1},
    "compact sweeps beside one that adds": {"goals": [[SET_A], [COMPACT, SWEEP]], "start": START, "kills": 1},
    "a sleeper beside others who cut the log": {"goals": [[SET_A], [SET_B, SET_C]], "kills": 1, "cuts": 2},
    "the same, answers are lost": {"goals": [[SET_A], [SET_B, SET_C]], "kills": 1, "losses": 1, "cuts": 2},
    "a reader between publishes": {"goals": [[SET_A], [COMPACT], [READ]], "start": START},
    "three add": {"goals": [[SET_A], [SET_B], [SET_C]], "kills": 1},
    "three, two of them the same": {"goals": [[SET_A], [SET_A], [SET_B]], "kills": 1},
    "three, one reads": {"goals": [[SET_A], [SET_B], [READ]], "start": START, "kills": 1},
}
LARGE_COMPANIES: dict[str, dict[str, Any]] = {
    "replace, remove, compact": {"goals": [[SET_A], [DROP_A], [COMPACT]], "start": START, "kills": 1},
    "replace, compact, sweep": {"goals": [[SET_A], [COMPACT], [SWEEP]], "start": START, "kills": 1},
    "all at once": {"goals": [[SET_A, READ], [COMPACT], [SWEEP]], "start": START, "kills": 1, "cuts": 1},
    "sleepers, sweeps and cuts": {"goals": [[SET_A], [SET_B, SWEEP], [SET_C]], "start": START, "cuts": 2},
    "two add, everything breaks": {"goals": [[SET_A], [SET_B]], "kills": 2, "losses": 3, "cuts": 1},
}


@pytest.mark.parametrize("name", COMPANIES)
def test_nothing_is_lost_or_doubled_in_any_interleaving(name: str) -> None:
    judge(COMPANIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_COMPANIES)
def test_nothing_is_lost_or_doubled_among_more(name: str) -> None:
    judge(LARGE_COMPANIES[name])


def judge(company: dict[str, Any]) -> None:
    started = time.perf_counter()
    explored = explore(**company)
    print(f"{explored.states} states, {explored.finals} final, {time.perf_counter() - started:.1f} s")
    assert explored.finals and "done" in explored.ends
    sweeps = any(SWEEP in goals for goals in company["goals"])
    allowed = {"done"} | ({"dead"} if company.get("kills") else set()) | ({"failed"} if sweeps else set())
    # what nobody can say takes a log that was cut under a sleeper
    assert explored.ends <= allowed | ({"unknown"} if company.get("cuts") else set())


BROKEN: dict[str, tuple[Rules, dict[str, Any]]] = {
    "a sleeper does not look after its put": (
        Rules(checks_after_put=False),
        {"goals": [[SET_A], [SET_B, SET_C]], "cuts": 1},
    ),
    "compact does not give way": (Rules(gives_way=False), {"goals": [[SET_A], [COMPACT]], "start": START}),
    "a change brings files that were swept": (Rules(checks_files=False), {"goals": [[SET_A], [SWEEP]]}),
    "a publisher does not look at the number": (Rules(reads_number=False), {"goals": [[SET_A], [SET_B]]}),
    "the next number does not wait": (Rules(waits_for_published=False), {"goals": [[SET_A], [SET_B]]}),
    "a reader takes the newest of each table": (
        Rules(bounded_reads=False),
        {"goals": [[SET_A], [READ]], "start": START},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_shows(name: str) -> None:
    rules, company = BROKEN[name]
    explore(**company)  # sound as long as the rule holds
    with pytest.raises(Violation):
        explore(**company, rules=rules)
