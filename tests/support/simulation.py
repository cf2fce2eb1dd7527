"""Jobs that are killed and paused at every step, while others run: what comes of it, counted.

    python tests/support/simulation.py FOLDER [--jobs A,B] [--others C,D] [--only kills|pauses] [--looks] [--s3]
    python tests/support/simulation.py FOLDER --walks COUNT [--seed N]     (or --minutes MINUTES)

Every effect on storage is a numbered step (storage_steps.at_step). A job is killed with SIGKILL before each of its
steps, and the same command runs again, at once or after another job; and it is paused before each of its steps while
another one runs whole. Whatever happened, the store must be sound (`verify --deep`) and say what it says when the jobs
run one after the other, in one order or the other. Random walks (walks.py) do both to three or four jobs, and before
looks at a log, too; `--walks 1 --seed N` repeats the one of seed N.

This process forks the ones that use storage, and uses none itself: delta-rs cannot be forked once it was used. What
is found is printed as one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from s3_server import BUCKET, S3Server, s3_server
from simulated_jobs import (
    JOBS,
    OTHERS,
    PARTS_OF_RUN,
    PRUNES_AS_PLANNED,
    Place,
    jobs_in_process,
    make_inputs,
    make_store,
    prune_as_planned,
)
from stopped_jobs import be_quiet, took
from storage_steps import at_step
from store_contents import Contents, contents_of, differences, twice
from trials import Figures, Trial, blame, broke, run_job
from walks import Order, Walk, orders_like, random_walk

from pipelines.upkeep import verify

LONGEST = 300  # steps of one job
# Compacting costs as much as a trial.
SWEPT_EVERY = 8
WALKS_BETWEEN_REPORTS = 50
# A job writes fewer; what it leaves is removed by `compact`.
MOST_LEFTOVERS = 40


class Stores:
    """Where stores of trials lie; used in the processes that use storage."""

    def __init__(self, folder: Path, server: S3Server | None) -> None:
        self.template = Place(
            f"s3://{BUCKET}/template" if server else str(folder / "template"),
            str(folder / "inputs"),
            server.options if server else {},
        )
        self._bytes: dict[str, bytes] = {}

    def copy(self, place: Place, name: str) -> Place:
        """The same store under another name."""
        uri = f"{place.store.rpartition('/')[0]}/{name}"
        if not place.options:
            shutil.copytree(place.store, uri)
        else:
            fs, root = self._fs(), place.store.removeprefix("s3://")
            found = self._bytes if place is self.template else {}
            if not found:
                found |= fs.cat(fs.find(root))
            fs.pipe({f"{uri.removeprefix('s3://')}{path.removeprefix(root)}": data for path, data in found.items()})
        return Place(uri, place.inputs, place.options)

    def remove(self, place: Place) -> None:
        if not place.options:
            shutil.rmtree(place.store)
        else:
            self._fs().rm(place.store.removeprefix("s3://"), recursive=True)

    def _fs(self) -> Any:
        from s3fs import S3FileSystem

        return S3FileSystem(**self.template.options, use_listings_cache=False)


class Judge:
    """Runs jobs in one process, and says what comes of them. looks: pause jobs before they look at a log, too."""

    def __init__(self, stores: Stores, looks: bool) -> None:
        self._stores = stores
        self._looks = looks
        self._expected: dict[tuple[str, ...], Contents] = {}
        self._judged = 0

    def after_kill(self, place: Place, trial: Trial) -> Trial:
        """`job` was killed in the store at `place`: have the other one run, and the same again."""
        job, other = trial.job, trial.other
        if not other:
            self._must_be_sound(place, trial, "right after the kill")
        for name in [other, job] if other else [job]:
            run_job(place, name, trial)
        between = [other] if other else []
        allowed = [(*between, job), (job, *between, job)]
        if job == "run":
            allowed += [(*PARTS_OF_RUN[:at], *between, "run") for at in range(1, len(PARTS_OF_RUN))]
        self._must_hold(place, trial, allowed)
        self._sweep(place, trial, allowed)
        self._stores.remove(place)
        return trial

    def paused(self, trial: Trial) -> Trial:
        """`job` stands before one of its steps while the other one runs whole, and goes on."""
        job, other = trial.job, trial.other
        place = self._stores.copy(self._stores.template, "trial")
        unfinished: list[str] = []

        def run(name: str) -> None:
            if run_job(place, name, trial, may_fail=True):
                unfinished.append(name)

        with at_step(trial.step, partial(run, other), reads=self._looks) as taken:
            run(job)
        trial.ended = len(taken) <= trial.step
        if not trial.ended:
            allowed = [(job, other), (other, job)]
            if job == "run":
                allowed += [(*PARTS_OF_RUN[:at], other, *PARTS_OF_RUN[at:]) for at in range(1, len(PARTS_OF_RUN))]
            if (job, other) == ("prune", "run"):
                allowed.append((other, prune_as_planned(new=True, changed=False)))
            if unfinished:
                trial.again = True
                for name in unfinished:
                    run_job(place, name, trial)
                allowed += [(*before, name) for before in allowed for name in (job, other)]
                allowed += [(*before, name) for before in allowed for name in (job, other)]
            self._must_hold(place, trial, allowed)
            self._sweep(place, trial, allowed)
        self._stores.remove(place)
        return trial

    def after_walk(self, place: Place, trial: Trial, again: Sequence[str], allowed: Sequence[Order]) -> Trial:
        """Jobs ran as they did in the store at `place`: have some run again."""
        for name in again:
            run_job(place, name, trial)
        self._must_hold(place, trial, allowed)
        self._sweep(place, trial, allowed)
        self._stores.remove(place)
        return trial

    def _must_be_sound(self, place: Place, trial: Trial, when: str) -> verify.Result | None:
        try:
            found = verify.run(place.config(), store=place.store, deep=True)
        except Exception as error:
            blame(trial, f"unsound: {when}, {broke('verify', error)}")
            return None
        if found.problems:
            blame(trial, f"unsound: {when}, {found.problems}")
        return found

    def _must_hold(self, place: Place, trial: Trial, allowed: Sequence[tuple[str, ...]]) -> None:
        found = self._must_be_sound(place, trial, "at the end")
        if found is None or trial.wrong:
            return
        trial.leftovers = found.unreferenced_files
        if trial.leftovers > MOST_LEFTOVERS:
            blame(trial, f"leftovers: {trial.leftovers}")
        contents = contents_of(place.store, place.config())
        if tables := twice(contents):
            blame(trial, f"twice: {tables}")
        differing = []
        for one in dict.fromkeys(allowed):
            differing.append(differences(contents, self._after(one)))
            if not differing[-1]:
                return
        lost = all(_lacks(contents, self._after(one)) for one in allowed)
        blame(trial, f"{'lost' if lost else 'wrong'}: unlike {allowed[0]} in {min(differing, key=len)}")

    def _sweep(self, place: Place, trial: Trial, allowed: Sequence[tuple[str, ...]]) -> None:
        """Now and then: compact without any retention removes what is left over, and nothing else."""
        self._judged += 1
        if trial.wrong or self._judged % SWEPT_EVERY:
            return
        before = contents_of(place.store, place.config())
        run_job(place, "compact", trial)
        found = self._must_be_sound(place, trial, "after compact")
        if found is None or trial.wrong:
            return
        trial.swept = True
        if found.unreferenced_files:
            blame(trial, f"leftovers: {found.unreferenced_files} after compact")
        if tables := differences(before, contents_of(place.store, place.config())):
            blame(trial, f"wrong: compact changed {tables}")

    def _after(self, jobs: tuple[str, ...]) -> Contents:
        """What a store holds in which some jobs ran one after the other."""
        if jobs not in self._expected:
            place = self._stores.copy(self._stores.template, "expected")
            for name in jobs:
                (JOBS | PRUNES_AS_PLANNED)[name](place)
            self._expected[jobs] = contents_of(place.store, place.config())
            self._stores.remove(place)
        return self._expected[jobs]


def _lacks(found: Contents, expected: Contents) -> bool:
    return any(path not in found or not set(found[path].keys).issuperset(rows.keys) for path, rows in expected.items())


class Child:
    """A process of its own that answers requests: (method, arguments)."""

    def __init__(self, make: Callable[[], Any]) -> None:
        to_child, self._requests = os.pipe()
        self._answers, from_child = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._requests)
            os.close(self._answers)
            _serve(make, to_child, from_child)
        os.close(to_child)
        os.close(from_child)
        self._writer, self._reader = os.fdopen(self._requests, "wb"), os.fdopen(self._answers, "rb")

    def ask(self, method: str, *arguments: Any) -> Any:
        pickle.dump((method, arguments), self._writer)
        self._writer.flush()
        return pickle.load(self._reader)

    def close(self) -> None:
        self._writer.close()
        os.waitpid(self._pid, 0)
        self._reader.close()


def _serve(make: Callable[[], Any], requests: int, answers: int) -> None:
    """The child's side, to its end."""
    try:
        be_quiet()
        served = make()
        with os.fdopen(requests, "rb") as reader, os.fdopen(answers, "wb") as writer:
            while True:
                try:
                    method, arguments = pickle.load(reader)
                except EOFError:
                    os._exit(0)
                pickle.dump(getattr(served, method)(*arguments), writer)
                writer.flush()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def killed_at(place: Place, job: str, step: int) -> bool:
    """Run a job in a process of its own, which is killed before a step; whether it came to that."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            be_quiet()
            with at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                JOBS[job](place)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"{job} ended with {code} at step {step}"
    return code != 0


class Preparing:
    """What is done in a process of its own before the first trial."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._steps: dict[str, int] = {}

    def prepare(self, jobs: Iterable[str]) -> list[str]:
        """Make the store that trials begin with, and run some jobs once; the modules that this took."""
        before = set(sys.modules)
        make_store(self._stores.template)
        for name in jobs:
            place = self._stores.copy(self._stores.template, "warm")
            with at_step(LONGEST, lambda: None, reads=True) as taken:
                JOBS[name](place)
            self._steps[name] = len(taken)
            verify.run(place.config(), store=place.store, deep=True)
            contents_of(place.store, place.config())
            self._stores.remove(place)
        return sorted(set(sys.modules) - before)

    def steps(self) -> dict[str, int]:
        """How many steps and looks each of those jobs has."""
        return self._steps

    def copy(self, name: str) -> Place:
        return self._stores.copy(self._stores.template, name)


def simulate(
    folder: Path,
    jobs: Sequence[str] = tuple(JOBS),
    others: Sequence[str] | None = None,
    *,
    kills: bool = True,
    pauses: bool = True,
    looks: bool = False,
    server: S3Server | None = None,
) -> Figures:
    """All trials of some jobs, each beside all of some others; default: beside itself and OTHERS.

    folder: a place of its own, best in memory.
    """
    figures = Figures()
    with _prepared(folder, (*jobs, *(OTHERS if others is None else others)), looks, server) as (preparing, judge):
        for job in jobs:
            began = time.monotonic()
            beside = dict.fromkeys([*OTHERS, job]) if others is None else others
            if kills:
                _kill_everywhere(job, [*beside], preparing, judge, figures)
            if pauses:
                _pause_everywhere(job, [*beside], judge, figures)
            print(f"{job}: {time.monotonic() - began:.0f} s, {dict(figures.counts)}", file=sys.stderr, flush=True)
    return figures


def simulate_walks(
    folder: Path,
    jobs: Sequence[str],
    seed: int,
    *,
    count: int | None = None,
    minutes: float = 0,
    server: S3Server | None = None,
) -> Figures:
    """Random walks of some jobs, `count` of them or for some minutes. Their seeds follow one another from `seed` on, so
    that each can be had alone."""
    figures = Figures()
    with _prepared(folder, jobs, True, server) as (preparing, judge):
        until = time.monotonic() + 60 * minutes
        steps = figures.steps = preparing.ask("steps")
        number = seed
        while time.monotonic() < until if count is None else number < seed + count:
            figures.take_walk(*_walk(random_walk(number, steps), number, preparing, judge))
            number += 1
            if (number - seed) % WALKS_BETWEEN_REPORTS == 0:
                print(f"{number - seed} walks: {dict(figures.counts)}", file=sys.stderr, flush=True)
    return figures


def _walk(planned: Walk, seed: int, preparing: Child, judge: Child) -> tuple[Walk, Trial]:
    place = preparing.ask("copy", "trial")
    trial = Trial("walk", ", ".join(map(str, planned)), "", seed)
    walk, again, trial = took(place, planned, 0, trial)
    trial.again = any(walk[at].fate != "killed" for at in again)
    jobs = [walk[at].job for at in sorted(again)]
    return walk, judge.ask("after_walk", place, trial, jobs, orders_like(walk, again))


@contextlib.contextmanager
def _prepared(folder: Path, jobs: Sequence[str], looks: bool, server: S3Server | None) -> Iterator[tuple[Child, Child]]:
    """A Preparing and a Judge, each in a process of its own, where everything is that these jobs need."""
    torch.set_num_threads(1)
    make_inputs(folder / "inputs")
    stores = Stores(folder, server)
    with jobs_in_process(), _child(lambda: Preparing(stores)) as preparing:
        for name in preparing.ask("prepare", tuple(dict.fromkeys(jobs))):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.freeze()  # what is there now is shared by all children
        with _child(lambda: Judge(stores, looks)) as judge:
            yield preparing, judge


def _kill_everywhere(job: str, others: Sequence[str], preparing: Child, judge: Child, figures: Figures) -> None:
    for step in range(LONGEST):
        for other in ("", *others):
            place = preparing.ask("copy", "trial")
            killed = killed_at(place, job, step)
            if not killed:
                judge.ask("after_kill", place, Trial("kill", job, "", step))
                figures.steps[job] = step
                return
            figures.take(judge.ask("after_kill", place, Trial("kill", job, other, step)))
    raise AssertionError(f"{job} has more than {LONGEST} steps")


def _pause_everywhere(job: str, others: Sequence[str], judge: Child, figures: Figures) -> None:
    for other in others:
        for step in range(LONGEST):
            trial = judge.ask("paused", Trial("pause", job, other, step))
            if trial.ended:
                figures.counts["pairs"] += 1
                break
            figures.take(trial)
        else:
            raise AssertionError(f"{job} has more than {LONGEST} steps")


@contextlib.contextmanager
def _child(make: Callable[[], Any]) -> Iterator[Child]:
    child = Child(make)
    try:
        yield child
    finally:
        child.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--others", help="default: all; empty: none")
    parser.add_argument("--only", choices=("kills", "pauses"))
    parser.add_argument("--looks", action="store_true", help="pause jobs before they look at a log, too")
    parser.add_argument("--walks", type=int, metavar="COUNT", help="only so many random walks of three or four jobs")
    parser.add_argument("--minutes", type=float, help="only random walks, for so long")
    parser.add_argument("--seed", type=int, default=0, help="of the first walk; the next one has the next")
    parser.add_argument("--s3", action="store_true", help="on a real S3 server of its own")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    with s3_server(asked.folder) if asked.s3 else contextlib.nullcontext() as server:
        figures = _asked_for(asked, server)
    print(
        json.dumps(
            {"counts": figures.counts, "steps": figures.steps, "wrong": figures.wrong, "untold": figures.untold},
            indent=1,
        )
    )


def _asked_for(asked: argparse.Namespace, server: S3Server | None) -> Figures:
    jobs = asked.jobs.split(",")
    if asked.walks is not None or asked.minutes is not None:
        return simulate_walks(
            asked.folder, jobs, asked.seed, count=asked.walks, minutes=asked.minutes or 0, server=server
        )
    return simulate(
        asked.folder,
        jobs,
        None if asked.others is None else [name for name in asked.others.split(",") if name],
        kills=asked.only != "pauses",
        pauses=asked.only != "kills",
        looks=asked.looks,
        server=server,
    )


if __name__ == "__main__":
    main()
