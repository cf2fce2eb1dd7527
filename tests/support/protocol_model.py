"""A model of how changes reach a store (docs/transactions.md), explored through every interleaving.

Processes set, drop, compact, sweep and read items in two tables through one log of transactions. A step is what storage
does at once: a listing, a read, a conditional put, a commit, a removal. Between any two steps every other process may
run for as long as it likes, any process may be killed, the answer of a put or of a commit may be lost, its request may
arrive late, and whoever cleans up may cut the log as far as it ever may. There is no clock: a pause is of any length.

A store in the model holds files, and a file holds items: (key, version). Both tables hold the same files, each under
its own log. What is asserted, in every state:

- each key once, in the version that the transactions in force say, in both tables after one more process has opened
  the store; every file that a table names is there;
- a number has one content for ever; who said `done` finds its transaction in force;
- two tables read through one snapshot are of one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

TABLES = (0, 1)
NO_VERSIONS = (None, None, None)  # of the tables, and of none behind the last


class Violation(AssertionError):
    """Something that must never happen; the message says what."""


class File(NamedTuple):
    name: str
    items: frozenset[tuple[str, int]]


class Entry(NamedTuple):
    """A transaction. goal: what its process was asked for, which an independent judge applies to a plain dict."""

    token: str
    previous: str
    remove: frozenset[File]
    add: frozenset[File]
    sweep: frozenset[File]
    goal: tuple[Any, ...]


class Version(NamedTuple):
    """One version of a table. number, token: of the transaction that made it."""

    number: int
    token: str
    files: frozenset[File]


class Process(NamedTuple):
    """goals: what is left to do, the first one at work. claims: tokens that it said were done.

    A goal is ("set", key, version), ("drop", key), ("compact", names of files, their items), ("sweep",) or ("read",).
    """

    name: str
    goals: tuple[tuple[Any, ...], ...]
    at: tuple[Any, ...]
    claims: tuple[str, ...] = ()


class Explored(NamedTuple):
    """How much was seen. ends: how processes ended, in any of the final states."""

    states: int
    finals: int
    ends: frozenset[str]


class State(NamedTuple):
    log: frozenset[tuple[int, Entry]]  # the files of the log
    marked: int  # every transaction up to here is published
    tables: tuple[tuple[Version, ...], ...]
    stored: frozenset[File]
    flying: frozenset[tuple[Any, ...]]  # requests whose sender knows no answer: they may still arrive
    processes: tuple[Process, ...]
    in_force: tuple[Entry, ...]  # what no process can see: the transactions that happened, in order
    kills: int
    losses: int
    cuts: int


@dataclass(frozen=True)
class Rules:
    """What a correct process does; a test switches one off and expects a violation."""

    checks_after_put: bool = True  # looks whether its number was the next one, and not one long past
    gives_way: bool = True  # compact leaves files that are gone
    checks_files: bool = True  # that a change brings are there, before it is written
    reads_number: bool = True  # of the table, before publishing to it
    waits_for_published: bool = True  # before the next number is written
    bounded_reads: bool = True  # a reader takes the version of its transaction, not the newest


def explore(
    goals: list[list[tuple[Any, ...]]],
    *,
    start: dict[str, list[tuple[str, int]]] | None = None,
    kills: int = 0,
    losses: int = 0,
    cuts: int = 0,
    rules: Rules | None = None,
) -> Explored:
    """Every state that processes with these goals can reach, each of them checked.

    start: files of a store from before transactions, name -> items. Raises Violation.
    """
    rules = rules or Rules()
    files = frozenset(File(name, frozenset(items)) for name, items in (start or {}).items())
    processes = tuple(Process("PQRS"[at], tuple(theirs), ("write",)) for at, theirs in enumerate(goals))
    before = ((Version(0, "", files),),) * len(TABLES)
    first = State(frozenset(), 0, before, files, frozenset(), processes, (), kills, losses, cuts)
    items = {key: version for file in files for key, version in file.items}
    seen, todo, finals, ends = {first}, [first], 0, set[str]()
    while todo:
        state = todo.pop()
        check(state, items)
        following = list(successors(state, rules))
        if all(process.at[0] in ENDS for process in state.processes):
            finals += 1
            ends |= {process.at[0] for process in state.processes}
        for one in following:
            if one not in seen:
                seen.add(one)
                todo.append(one)
    return Explored(len(seen), finals, frozenset(ends))


ENDS = ("done", "dead", "failed", "unknown")


def successors(state: State, rules: Rules) -> Iterator[State]:
    for at, process in enumerate(state.processes):
        if process.at[0] in ENDS:
            continue
        for after, changed in steps(state, process, rules):
            processes = (*state.processes[:at], changed, *state.processes[at + 1 :])
            yield after._replace(processes=processes)
        if state.kills:
            dead = process._replace(at=("dead",), goals=())
            processes = (*state.processes[:at], dead, *state.processes[at + 1 :])
            yield state._replace(processes=processes, kills=state.kills - 1)
    for request in state.flying:
        yield arrive(state._replace(flying=state.flying - {request}), request)
    if state.cuts:
        for number, entry in state.log:
            if number < state.marked:  # whoever cuts the log may have listed it long ago
                yield state._replace(log=state.log - {(number, entry)}, cuts=state.cuts - 1)


def arrive(state: State, request: tuple[Any, ...]) -> State:
    """A conditional request takes effect where its condition holds."""
    return put(state, *request[1:])[0] if request[0] == "put" else commit(state, *request[1:])[0]


def put(state: State, number: int, entry: Entry) -> tuple[State, bool]:
    """Put-if-absent of a file of the log."""
    if any(number == taken for taken, _ in state.log):
        return state, False
    if number > len(state.in_force) + 1:
        raise Violation(f"number {number} follows {len(state.in_force)}")
    in_force = (*state.in_force, entry) if number == len(state.in_force) + 1 else state.in_force
    return state._replace(log=state.log | {(number, entry)}, in_force=in_force), True


def commit(state: State, table: int, on_top_of: int, number: int, entry: Entry) -> tuple[State, bool]:
    """A commit to a table, on top of the version that was read."""
    versions = state.tables[table]
    if len(versions) != on_top_of:
        return state, False
    files = versions[-1].files
    if not entry.remove <= files or files & entry.add:
        raise Violation(f"transaction {number} does not fit table {table}")
    new = (*versions, Version(number, entry.token, (files - entry.remove) | entry.add))
    return state._replace(tables=(*state.tables[:table], new, *state.tables[table + 1 :])), True


def newest(state: State) -> int:
    return max((number for number, _ in state.log), default=0)


def entry_of(state: State, number: int) -> Entry | None:
    return next((entry for taken, entry in state.log if taken == number), None)


def files_at(state: State, table: int, number: int) -> frozenset[File]:
    """Of the newest version that no later transaction made."""
    return next(version.files for version in reversed(state.tables[table]) if version.number <= number)


def steps(state: State, process: Process, rules: Rules) -> Iterator[tuple[State, Process]]:
    """What one process may do next."""
    step, *rest = process.at
    goal = process.goals[0]

    def to(*at: Any) -> Process:
        return process._replace(at=at)

    if step == "write":  # its own file, which no table names yet
        own = own_file(process)
        stored = state.stored | {own} if own else state.stored
        yield state._replace(stored=stored), to("read" if goal[0] == "read" else "list")
    elif step == "list":
        number = newest(state)
        yield state, to("get", number) if number else to("plan", 0, None)
    elif step == "get":  # and list again: a file that is still the newest was never another one
        (number,) = rest
        entry = entry_of(state, number)
        if entry is None or newest(state) != number:
            yield state, to("list")
        elif state.marked >= number or not rules.waits_for_published:
            yield state, to("plan", number, entry)
        else:
            yield state, to("publish", number, entry, 0, None, "plan", NO_VERSIONS)
    elif step == "publish":
        yield from publish(state, process, rules)
    elif step == "sweep":
        number, entry, left, then = rest
        if left:
            yield state._replace(stored=state.stored - {left[0]}), to("sweep", number, entry, left[1:], then)
        else:
            yield state, to("mark", number, entry, then)
    elif step == "mark":
        number, entry, then = rest
        after = state._replace(marked=max(state.marked, number))
        yield after, claim(process, entry.token) if then == "done" else to("plan", number, entry)
    elif step == "plan":
        yield from plan(state, process, rules)
    elif step == "put":
        number, entry, opened = rest
        after, landed = put(state, number, entry)
        yield after, to("check", number, entry, opened) if landed else to("list")
        if state.losses:
            lost = state._replace(losses=state.losses - 1)
            if landed:
                yield after._replace(losses=state.losses - 1), to("read back", *rest)
            yield lost._replace(flying=lost.flying | {("put", number, entry)}), to("read back", *rest)
    elif step == "read back":
        number, entry, opened = rest
        found = entry_of(state, number)
        if found is None:
            yield state, to("put", *rest)
        else:
            yield state, to("check", *rest) if found.token == entry.token else to("list")
    elif step == "check":
        yield from check_after_put(state, process, rules)
    elif step == "take back":  # a number long past, which others had used
        number, entry = rest
        yield state._replace(log=state.log - {(number, entry)}), to("list")
    elif step == "read":
        number = newest(state)
        yield state, to("read table", number if state.marked >= number else number - 1, 0, ())
    elif step == "read table":
        number, table, found = rest
        files = files_at(state, table, number) if rules.bounded_reads else state.tables[table][-1].files
        if table + 1 < len(TABLES):
            yield state, to("read table", number, table + 1, (*found, files))
        elif {files, *found} != {files_in_force(state, number)}:
            raise Violation(f"a reader of transaction {number} found tables of others")
        else:
            yield state, finished(process)


def publish(state: State, process: Process, rules: Rules) -> Iterator[tuple[State, Process]]:
    """Table by table: read the newest number, commit on top of what was read; whoever was first, it is there once.

    opened: the versions that the change was planned on, which its own writer tries without reading again.
    """
    number, entry, table, read, then, opened = process.at[1:]

    def to(*at: Any) -> Process:
        return process._replace(at=at)

    if table == len(TABLES) or not (entry.add or entry.remove):
        yield state, to("sweep", number, entry, tuple(sorted(entry.sweep)), then)
    elif read is None:
        versions = state.tables[table]
        if versions[-1].number >= number and rules.reads_number:
            yield state, to("publish", number, entry, table + 1, opened[table + 1], then, opened)
        else:
            yield state, to("publish", number, entry, table, len(versions), then, opened)
    else:
        request = (table, read, number, entry)
        after, landed = commit(state, *request)
        again = to("publish", number, entry, table, None, then, opened)
        yield after, to("publish", number, entry, table + 1, opened[table + 1], then, opened) if landed else again
        if state.losses:
            lost = state._replace(losses=state.losses - 1)
            if landed:
                yield after._replace(losses=state.losses - 1), again
            yield lost._replace(flying=lost.flying | {("commit", *request)}), again


def check_after_put(state: State, process: Process, rules: Rules) -> Iterator[tuple[State, Process]]:
    """Was the number that this process wrote the next one, or one that others had used and cut from the log since?"""
    number, entry, opened = process.at[1:]
    following = entry_of(state, number + 1)
    if newest(state) == number or not rules.checks_after_put:
        yield state, process._replace(at=("publish", number, entry, 0, opened[0], "done", opened))
    elif following is None:  # the log was cut beyond it: nobody can say
        yield state, process._replace(at=("unknown",), goals=())
    elif following.previous == entry.token:  # others went on from here, after they had published it
        yield state, claim(process, entry.token)
    else:
        yield state, process._replace(at=("take back", number, entry))


def claim(process: Process, token: str) -> Process:
    return finished(process._replace(claims=(*process.claims, token)))


def finished(process: Process) -> Process:
    goals = process.goals[1:]
    return process._replace(goals=goals, at=("write",) if goals else ("done",))


def own_file(process: Process) -> File | None:
    """What a process writes before it looks at the store, as workers do."""
    goal = process.goals[0]
    if goal[0] != "set":
        return None
    return File(f"{goal[1]}{goal[2]}{process.name}", frozenset([(goal[1], goal[2])]))


def plan(state: State, process: Process, rules: Rules) -> Iterator[tuple[State, Process]]:
    """The change that a goal asks of the snapshot, or nothing; files it takes are written in the same step, since
    nobody can name them."""
    number, entry = process.at[1:]
    files = files_at(state, 0, number)
    if rules.waits_for_published and files != files_at(state, 1, number):
        raise Violation(f"the tables of transaction {number} differ")
    change = build(state, process, rules, files, number)
    if change is None:
        yield state, finished(process)
        return
    remove, add, sweep = change
    own = own_file(process)
    if rules.checks_files and own in add and own not in state.stored:
        yield state, process._replace(at=("failed",), goals=())
        return
    written = add - {own} if own else add
    opened = (*(sum(version.number <= number for version in versions) for versions in state.tables), None)
    token = f"{process.name}{number + 1}{process.goals[0]}"
    new = Entry(token, entry.token if entry else "", remove, add, sweep, process.goals[0])
    yield state._replace(stored=state.stored | written), process._replace(at=("put", number + 1, new, opened))


Change = tuple[frozenset[File], frozenset[File], frozenset[File]]
NONE: frozenset[File] = frozenset()


def build(state: State, process: Process, rules: Rules, files: frozenset[File], number: int) -> Change | None:
    """(files that go, files that come, files to sweep)."""
    goal = process.goals[0]
    if goal[0] in ("set", "drop"):
        key = goal[1]
        holding = frozenset(file for file in files if any(key == one for one, _ in file.items))
        if goal[0] == "set" and any((key, goal[2]) in file.items for file in holding):
            return None
        if goal[0] == "drop" and not holding:
            return None
        copies = set()
        for file in holding:
            kept = frozenset(item for item in file.items if item[0] != key)
            if kept:
                copies.add(File(f"{file.name}-{key}{process.name}{number}", kept))
        own = own_file(process)
        return holding, frozenset(copies | ({own} if own else set())), NONE
    if goal[0] == "compact":
        merged = goal[1]  # names of the files that it merged when it began
        old = frozenset(file for file in files if file.name in merged)
        if len(old) < len(merged):
            if rules.gives_way:
                return None
            old_items = frozenset(goal[2])  # it commits what it had merged
            return old, frozenset([File(f"merged{process.name}", old_items)]), NONE
        items = frozenset(item for file in old for item in file.items)
        return old, frozenset([File(f"merged{process.name}{number}", items)]), NONE
    unnamed = state.stored - files
    return (NONE, NONE, unnamed) if unnamed else None


def files_in_force(state: State, number: int) -> frozenset[File]:
    """What the transactions up to a number say that a table holds."""
    files = state.tables[0][0].files
    for entry in state.in_force[:number]:
        files = (files - entry.remove) | entry.add
    return files


def check(state: State, start: dict[str, int]) -> None:
    """What one more process finds after it has opened the store, judged by the goals alone."""
    number = len(state.in_force)
    if newest(state) != number or (number and entry_of(state, number) != state.in_force[-1]):
        raise Violation(f"the newest file of the log is {newest(state)}, transaction {number} is in force")
    wanted = dict(start)
    for entry in state.in_force:
        if entry.goal[0] == "set":
            wanted[entry.goal[1]] = entry.goal[2]
        elif entry.goal[0] == "drop":
            wanted.pop(entry.goal[1], None)
    for table in TABLES:
        files = state.tables[table][-1].files
        for version in state.tables[table][1:]:
            if version.token != state.in_force[version.number - 1].token:
                raise Violation(f"number {version.number} was published with another content")
        if number > state.tables[table][-1].number:
            files = (files - state.in_force[-1].remove) | state.in_force[-1].add
        items = sorted(item for file in files for item in file.items)
        if items != sorted(wanted.items()):
            raise Violation(f"table {table} holds {items}, the transactions say {sorted(wanted.items())}")
        if missing := files - state.stored:
            raise Violation(f"table {table} names files that are gone: {missing}")
    known = {entry.token for entry in state.in_force}
    for process in state.processes:
        if lost := set(process.claims) - known:
            raise Violation(f"{process.name} said that {lost} was done, and it never happened")
