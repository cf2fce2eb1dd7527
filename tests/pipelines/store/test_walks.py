"""The orders that a walk may be like (tests/support/walks.py), counted by hand."""

from __future__ import annotations

import math

import pytest
from simulated_jobs import PARTS_OF_RUN
from walks import Planned, orders_like, random_walk

JOBS = ("extract new", "cluster", "cosegment", "correspond")


@pytest.mark.parametrize("length", [3, 4])
def test_paused_within_each_other_any_order_may_be(length: int) -> None:
    walk = (*(Planned(job, "paused") for job in JOBS[: length - 1]), Planned(JOBS[length - 1], "whole"))
    orders = orders_like(walk, ())
    assert len(set(orders)) == len(orders) == math.factorial(length)


def test_what_ran_one_after_the_other_has_one_order() -> None:
    assert orders_like(tuple(Planned(job, "whole") for job in JOBS), ()) == [JOBS]


def test_what_was_killed_did_all_or_nothing_and_runs_again() -> None:
    walk = (Planned("cluster", "killed"), Planned("correspond", "whole"))
    assert set(orders_like(walk, {0})) == {("correspond", "cluster"), ("cluster", "correspond", "cluster")}


def test_of_several_jobs_the_first_ones_may_be_done() -> None:
    walk = (Planned("run", "killed"), Planned("correspond", "whole"))
    assert set(orders_like(walk, {0})) == {(*PARTS_OF_RUN[:at], "correspond", *PARTS_OF_RUN) for at in range(4)}


def test_a_paused_run_is_around_what_ran_meanwhile() -> None:
    walk = (Planned("run", "paused"), Planned("correspond", "whole"))
    assert set(orders_like(walk, ())) == {(*PARTS_OF_RUN[:at], "correspond", *PARTS_OF_RUN[at:]) for at in range(4)}


def test_a_prune_leaves_what_came_after_its_plan() -> None:
    walk = (Planned("prune", "paused"), Planned("extract new", "whole"))
    assert set(orders_like(walk, ())) == {
        ("prune", "extract new"),
        ("extract new", "prune"),
        ("extract new", "all but one, and new"),
    }


def test_a_walk_is_that_of_its_seed() -> None:
    steps = dict.fromkeys(JOBS, 20)
    walks = [random_walk(seed, steps) for seed in range(50)]
    assert walks == [random_walk(seed, steps) for seed in range(50)] and len(set(walks)) > 40
    assert {len(one) for one in walks} == {3, 4} and all(one[-1].fate == "whole" for one in walks)
