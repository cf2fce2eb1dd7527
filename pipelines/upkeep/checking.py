"""What is wrong with a store: every check of every part of it, as findings that say how they are mended.

One damaged part does not keep the others from being checked. Rows are judged where their files can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa

from pipelines import storage
from pipelines.jobs import JOBS
from pipelines.results.all_kinds import KINDS, check_result, look_at_results
from pipelines.results.cluster_models import read_model
from pipelines.results.clusters import checkpoint_uri, clusters_uri
from pipelines.results.names import result_names, result_uri
from pipelines.results.stored import StoredResult
from pipelines.store import projection
from pipelines.store.changes import Transaction
from pipelines.store.damage import DamagedLog, DamagedResult
from pipelines.store.findings import (
    ByHand,
    Finding,
    RemoveFile,
    RemoveLeftover,
    RewriteTransaction,
    WriteLogAgain,
)
from pipelines.store.parquet import DamagedFile, MissingFile
from pipelines.store.schemas import IMAGES
from pipelines.store.snapshots import Snapshot, snapshot
from pipelines.store.store import Store
from pipelines.store.table import Table
from pipelines.store.transaction_log import FOLDER
from pipelines.upkeep.delta_logs import can_be_written_again
from pipelines.upkeep.file_checks import check_against_transactions, check_files
from pipelines.upkeep.row_checks import IMAGE_COLUMNS, check_rows

RESTORE = "restore it from a copy of the store, or extract into another STORE"


@dataclass
class Checked:
    """What a check found.

    findings: damage. unfinished: a transaction that is not completed, if there is one. notes: what is worth knowing
    and harmless. images, patches, failures: rows. files: that logs and manifests name. unreferenced_files: others,
    which are harmless.
    """

    findings: list[Finding] = field(default_factory=list)
    unfinished: Transaction | None = None
    notes: list[str] = field(default_factory=list)
    images: int = 0
    patches: int = 0
    failures: int = 0
    files: int = 0
    unreferenced_files: int = 0


def check(store: Store, *, deep: bool) -> Checked:
    """Check everything. deep: read every page of every table, and compare it with its checksum.

    Raises JobError for a file that cannot be reached or may not be read: nobody can say then whether it is damaged.
    """
    checked = Checked()
    current = _check_transactions(store, checked)
    if current is None:
        return checked
    results = _open_results(store, current, checked)
    tables = _open_extraction(store, current, checked)
    for result in results:
        tables |= {f"{result.path}/{name}": table for name, table in result.tables.items()}
    for path, table in tables.items():
        files, present = table.files(), table.present_files()
        checked.files += len(files)
        checked.unreferenced_files += len(present.keys() - files.keys())
        checked.findings.extend(check_files(path, table, deep=deep))
    checked.findings.extend(check_against_transactions(current, tables))
    _check_all_rows(store, results, checked)
    _check_other_files(store, results, checked)
    return checked


def _gather(store: Store, checked: Checked, found: Iterable[Finding]) -> None:
    """Add what a check finds, and a file that it could not read, which ends it."""
    try:
        checked.findings.extend(found)
    except (DamagedFile, MissingFile) as error:
        checked.findings.append(_unreadable(store, error))


def _unreadable(store: Store, error: DamagedFile | MissingFile) -> Finding:
    path, _, file = error.uri.removeprefix(f"{store.uri}/").rpartition("/")
    return Finding("file", path, f"{path}: {error}", RemoveFile(path, file))


# The log of transactions


def _check_transactions(store: Store, checked: Checked) -> Snapshot | None:
    """The store as its newest complete transaction left it; None where nobody can say what that is."""
    listing, log = store.log.listing(), store.log
    newest = max([listing.newest, *listing.marked])
    for number in listing.numbers:
        try:
            read = log.read(number)
        except DamagedLog as error:
            path = f"{FOLDER}/{number:020}.json"
            mend = RemoveLeftover(path) if number < newest else _of_the_newest(number, listing.marked)
            checked.findings.append(Finding("transaction", path, str(error), mend))
            continue
        if read and number == newest and number not in listing.marked:
            checked.unfinished = read
    if newest > listing.newest and newest not in log.listing().numbers:
        sentence = f"{log.uri_of(newest)} is gone, which says what the results of the store stand on."
        checked.findings.append(Finding("transaction", FOLDER, sentence, RewriteTransaction(newest)))
        return None
    try:
        return snapshot(log)
    except DamagedLog as error:
        if not checked.findings:
            checked.findings.append(Finding("transaction", FOLDER, str(error), ByHand(RESTORE)))
        return None


def _of_the_newest(number: int, marked: set[int]) -> RewriteTransaction | ByHand:
    if number in marked:
        return RewriteTransaction(number)
    return ByHand(
        "its change was not completed, and nobody can say any more what it was: restore the store from a copy"
    )


# Tables


def _open_extraction(store: Store, current: Snapshot, checked: Checked) -> dict[str, Table]:
    """The tables of the extraction by name, as one transaction left them; a damaged one is left out."""
    found: dict[str, Table] = {}
    for name, schema in store.schemas.items():
        advice = RESTORE
        if name == "failures":
            advice = f"remove {store.uri}/failures, and the next extract tries again whatever failed"
        try:
            table = current.table(name, schema)
            why = f"The log of {store.uri}/{name} is gone."
        except DamagedLog as error:
            table, why = None, str(error)
        if table is None:
            checked.findings.append(_of_a_log(current, name, why, advice))
        else:
            found[name] = table
            # so that rows of several tables can be compared
            store.take(name, table)
    return found


def _of_a_log(current: Snapshot, table: str, why: str, advice: str) -> Finding:
    again = can_be_written_again(current.log, table)
    return Finding("log", table, why, WriteLogAgain(table) if again else ByHand(advice))


def _open_results(store: Store, current: Snapshot, checked: Checked) -> list[StoredResult]:
    found = []
    for path, result in look_at_results(store):
        if isinstance(result, DamagedLog):
            checked.findings.extend(_damaged_logs(store, current, path))
        else:
            found.append(result)
    return found


def _damaged_logs(store: Store, current: Snapshot, path: str) -> Iterator[Finding]:
    """Which logs of a result that cannot be opened are damaged. path: KIND/NAME."""
    advice = f"remove {store.uri}/{path} and run `{command_for(store.uri, path)}`, which makes it again"
    for name in KINDS[path.partition("/")[0]].tables:
        table = f"{path}/{name}"
        try:
            why = "" if current.table(table) else f"The log of {store.uri}/{table} is gone."
        except DamagedLog as error:
            why = str(error)
        if why:
            yield _of_a_log(current, table, why, advice)


def command_for(store: str, path: str) -> str:
    """The command that makes a result, without its settings. path: KIND/NAME."""
    kind, _, name = path.partition("/")
    job = next(job for job in JOBS.values() if job.makes == kind)
    return f"dinoray {job.command} {store} {name}"


# Rows


def _read_images(store: Store, checked: Checked) -> pa.Table | None:
    try:
        return store.images.read(IMAGE_COLUMNS)
    except (DamagedFile, MissingFile) as error:
        checked.findings.append(_unreadable(store, error))
        return None


def _check_all_rows(store: Store, results: list[StoredResult], checked: Checked) -> None:
    unsound = {finding.path for finding in checked.findings}
    images = None if unsound & {"images", "patches", "failures"} else _read_images(store, checked)
    if images is not None:
        checked.images = len(images)
        checked.failures = sum(file.rows for file in store.failures.files().values())
        checked.patches = sum(file.rows for file in store.patches.files().values())
        _gather(store, checked, check_rows(store, images))
    for result in results:
        own = {f"{result.path}/{name}" for name in result.tables}
        if unsound & own or (images is None and not own):
            continue
        # tables are checked against each other, indices against images
        _check_result(store, result, IMAGES.empty_table() if images is None else images, checked)


def _check_result(store: Store, result: StoredResult, images: pa.Table, checked: Checked) -> None:
    def found() -> Iterator[Finding]:
        of_result = check_result(store, result, images)
        yield from (replace(one, sentence=f"{result.path}: {one.sentence}") for one in of_result.problems)
        checked.notes += of_result.notes
        checked.files += of_result.files
        checked.unreferenced_files += of_result.unreferenced_files

    _gather(store, checked, found())


# Other files


def _check_other_files(store: Store, results: list[StoredResult], checked: Checked) -> None:
    """The PCA of a store, settings that results were made with, and trainings that have not ended."""
    options = store.config.storage.options
    if checked.images:
        try:
            projection.read_projections(store.uri, store.config)
        except (DamagedFile, DamagedResult) as error:
            path = projection.projection_uri(store.uri).removeprefix(f"{store.uri}/")
            advice = "restore it from a copy of the store: what is stored stays readable, and nothing can be added"
            checked.findings.append(Finding("file", path, str(error), ByHand(advice)))
    for result in results:
        path = f"{result.path}/settings.json"
        try:
            storage.read_json(f"{result_uri(store.uri, result.kind, result.name)}/settings.json", options)
        except storage.DamagedJson as error:
            advice = (
                f"restore it from a copy, or remove {store.uri}/{result.path} and run "
                f"`{command_for(store.uri, result.path)}`, which makes it again"
            )
            checked.findings.append(Finding("setting", path, str(error), ByHand(advice)))
    for name in result_names(store.uri, "clusters", options):
        try:
            read_model(checkpoint_uri(clusters_uri(store.uri, name)), options)
        except DamagedFile as error:
            path = f"clusters/{name}/model/checkpoint.npz"
            checked.findings.append(Finding("file", path, str(error), RemoveLeftover(path)))
