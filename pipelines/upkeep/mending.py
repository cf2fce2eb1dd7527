"""What repair changes in a store: for each part of it one transaction, decided on what the store holds then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from pipelines import storage
from pipelines.errors import DinorayError
from pipelines.results.all_kinds import KINDS, find_result
from pipelines.results.cluster_statistics import Counting
from pipelines.results.clusters import ClusterTables, Update
from pipelines.results.indices import files_present, is_ours, read_manifest
from pipelines.results.linked_results import LinkedResult
from pipelines.store.changes import Change, TableChange, Transaction
from pipelines.store.damage import DamagedLog, DamagedResult
from pipelines.store.findings import (
    CountAgain,
    Finding,
    Mend,
    Reconcile,
    RemoveFile,
    RemoveLeftover,
    RemoveResult,
    RemoveRows,
    RestoreFile,
    RewriteTransaction,
    WriteLogAgain,
)
from pipelines.store.parquet import DamagedFile, DataFile
from pipelines.store.rewriting import rewrite_without
from pipelines.store.schemas import FAILURES
from pipelines.store.snapshots import Snapshot
from pipelines.store.store import Store
from pipelines.store.table import Table
from pipelines.store.transaction_log import FOLDER, TransactionLog
from pipelines.store.transactions import open_for_writing, transact
from pipelines.store.written_files import WrittenFiles
from pipelines.upkeep.checking import command_for
from pipelines.upkeep.delta_logs import write_log_again
from pipelines.upkeep.pairs import Damage, Pair, PairMender, difference

COMMAND = "repair"
EXTRACTION = ("images", "patches", "failures")


class Mender:
    """Mends a store, part by part. removed: rows that went so far, by table."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self.removed: Counter[str] = Counter()

    def mend(self, mends: Sequence[Mend]) -> None:
        """Mend everything that was found. Raises JobError where the store cannot be written."""
        for mend in mends:
            if isinstance(mend, RewriteTransaction):
                rewrite_transaction(self._store.log, mend.number)
                return  # what the store holds can be judged only now
        logs = [mend.table for mend in mends if isinstance(mend, WriteLogAgain)]
        for table in logs:
            write_log_again(self._store.log, table)
        if logs:
            # only the next check can say which files are damaged
            return
        open_for_writing(self._store.log)
        emptied = {mend.path for mend in mends if isinstance(mend, RemoveResult)}
        for path in sorted(emptied):
            self._empty(path)
        self._sweep({mend.path for mend in mends if isinstance(mend, RemoveLeftover)})
        damage = damage_of(mends)
        parts = {_part_of(table) for table in (*damage.files, *damage.restored, *damage.keys)}
        parts |= {mend.path for mend in mends if isinstance(mend, CountAgain)}
        for path in sorted(parts - emptied):
            if path in EXTRACTION:
                self._mend_extraction(damage)
                continue
            result = find_result(self._store, path)
            if isinstance(result, ClusterTables):
                self._mend_clusters(result, damage)
            elif isinstance(result, LinkedResult):
                self._mend_pair(Pair.of_result(result), damage)

    def _transact(self, build: Callable[[Snapshot], list[TableChange]], written: WrittenFiles) -> None:
        """Make a change, and count the rows that went. build: what changes in tables."""
        made: list[tuple[Change | None, Snapshot]] = []

        def decide(current: Snapshot) -> Change | None:
            changes = build(current)
            made[:] = [(Change(changes) if changes else None, current)]
            return made[0][0]

        transact(self._store.log, decide, run_id=self._run_id, command=COMMAND)
        ((change, current),) = made
        written.remove_unused(change)
        for one in change.tables if change else ():
            before = sum(current.files(one.table)[path].rows for path in one.remove)
            self._count(one.table, before - sum(file.rows for file in one.add))

    def _count(self, table: str, rows: int) -> None:
        if rows > 0:
            self.removed[table] += rows

    def _mend_pair(self, pair: Pair, damage: Damage) -> None:
        written = WrittenFiles()
        mender = PairMender(pair, damage, written, self._run_id)
        self._transact(mender.changes, written)

    def _mend_extraction(self, damage: Damage) -> None:
        written = WrittenFiles()
        mender = PairMender(Pair.of_extraction(self._store), damage, written, self._run_id)

        def build(current: Snapshot) -> list[TableChange]:
            of_pair = mender.changes(current) if _concerns(damage, ("images", "patches")) else []
            return [*of_pair, *self._failures(current, damage, written)]

        self._transact(build, written)

    def _failures(self, current: Snapshot, damage: Damage, written: WrittenFiles) -> Iterator[TableChange]:
        table = current.table("failures", FAILURES)
        if table is None or not _concerns(damage, ("failures",)):
            return
        files, gone = damage.sound_files(current, "failures"), damage.keys.get("failures", set())
        for path, file in list(files.items()):
            hit = gone.intersection(table.read_file(path, ["image_id"])["image_id"].to_pylist()) if gone else set()
            if hit:
                what = (path, frozenset(hit))
                copy = written.once(table, what, _copy_without(table, file, hit, self._run_id))
                del files[path]
                files |= {copy.path: copy} if copy else {}
        if change := difference(current, table, "failures", {"failures": files}):
            yield change

    def _mend_clusters(self, tables: ClusterTables, damage: Damage) -> None:
        """Take damaged files out, and count again what is left: new centroids, in any case."""
        try:
            model = tables.model()
        except (DamagedFile, DamagedResult):
            return self._empty(tables.path)
        if model is None:
            return
        settings, config = model.progress.settings, self._store.config
        counting = Counting(model.k, settings["metric"] == "cosine", config.store.salient_threshold)
        has_saliency = settings["of"] == "patches" and config.features.saliency
        path = tables.path_of("assignments")
        taken: list[int] = []

        def decide(current: Snapshot) -> Update | None:
            taken.clear()
            if tables.training_in(current) != model.progress.run_id:
                return None  # another training has taken its place
            here, sound = current.files(path), damage.sound_files(current, path)
            add = [file for name, file in sound.items() if name not in here]
            remove = [name for name in here if name not in sound]
            taken.append(sum(here[name].rows for name in remove))
            return Update(add, remove, model, tables.statistics(counting, sound), has_saliency)

        tables.update(self._run_id, decide, COMMAND)
        self._count(path, sum(taken))

    def _empty(self, path: str) -> None:
        """Remove all rows of a result, and whatever it points at. path: KIND/NAME."""
        store, kind, name = self._store, *path.split("/", 1)
        rows: dict[str, int] = {}

        def build(current: Snapshot) -> Change | None:
            pointer = current.pointers.get(path)
            sweep = {file for file in pointer.every_file if file.startswith(f"{path}/")} if pointer else set()
            changes: list[TableChange] = []
            if kind == "index":
                sweep |= {f"{path}/{file}" for file in files_present(store, name) if is_ours(file)}
            else:
                for table, schema in ClusterTables.schemas.items():
                    files = list(current.files(f"{path}/{table}"))
                    changes += [TableChange(f"{path}/{table}", schema, (), files)] if files else []
            if not changes and not pointer and not sweep:
                return None
            rows.clear()
            rows.update({one.table: sum(current.files(one.table)[file].rows for file in one.remove) for one in changes})
            return Change(changes, {path: None} if pointer else {}, sorted(sweep))

        transact(store.log, build, run_id=self._run_id, command=COMMAND)
        for table, count in rows.items():
            self._count(table, count)

    def _sweep(self, paths: set[str]) -> None:
        """Remove files that nobody needs; the mark of a transaction goes with it."""
        paths |= {f"{path.removesuffix('json')}published" for path in paths if path.startswith(f"{FOLDER}/")}
        if paths:
            change = Change(sweep=sorted(paths))
            transact(self._store.log, lambda current: change, run_id=self._run_id, command=COMMAND)


def _copy_without(table: Table, file: DataFile, gone: set[str], run_id: str) -> Callable[[], DataFile | None]:
    return lambda: rewrite_without(table, file, gone, run_id)


def damage_of(mends: Iterable[Mend]) -> Damage:
    """All that is known to be wrong with tables."""
    found = Damage()
    for mend in mends:
        if isinstance(mend, RemoveFile):
            found.files.setdefault(mend.table, set()).add(mend.file)
        elif isinstance(mend, RestoreFile):
            found.restored.setdefault(mend.table, {})[mend.file.path] = mend.file
        elif isinstance(mend, RemoveRows):
            found.keys.setdefault(mend.table, set()).update(mend.keys)
        elif isinstance(mend, Reconcile):
            found.keys.setdefault(mend.table, set())
    return found


def _concerns(damage: Damage, tables: Sequence[str]) -> bool:
    return any(table in known for known in (damage.files, damage.restored, damage.keys) for table in tables)


def _part_of(table: str) -> str:
    """What is mended in one transaction with a table: a result KIND/NAME, or the extraction, by one of its tables."""
    kind, _, rest = table.partition("/")
    return f"{kind}/{rest.partition('/')[0]}" if rest and kind in KINDS else "images"


def rewrite_transaction(log: TransactionLog, number: int) -> None:
    """Write the newest transaction again, whose file is damaged or gone and which every table has.

    What it did to tables stands in them. What results point at is taken from the transaction before; an index that it
    moved is found as it was before, which its next update brings up to date, and a clustering by its model's name.

    Raises DamagedLog where the one before is not there either.
    """
    before = log.read(number - 1) if number > 1 else None
    if number > 1 and before is None:
        raise DamagedLog(
            f"{log.uri_of(number)} is damaged, and {log.uri_of(number - 1)} is not there, from which it could be "
            "written again: restore the store from a copy."
        )
    again = Transaction(
        number=number,
        token=f"repaired-{number}",  # the same whoever repairs it
        previous=before.token if before else "",
        run_id="",
        command=COMMAND,
        created_at=before.created_at if before else "1970-01-01T00:00:00.000+00:00",
        pointers=dict(before.pointers) if before else {},
        changed=dict(before.changed) if before else {},
    )
    storage.write_bytes(log.uri_of(number), again.to_json(), log.options)
    log.make_durable()


def commands_after(store: Store, findings: Iterable[Finding]) -> Iterator[str]:
    """The commands that make again what goes when these findings are mended."""
    paths: dict[str, bool] = {}
    for finding in findings:
        mend = finding.mend
        if isinstance(mend, RemoveFile | RemoveRows | Reconcile):
            paths.setdefault(_part_of(mend.table), False)
        elif isinstance(mend, RemoveResult):
            paths[mend.path] = True
    for path, emptied in paths.items():
        if path in EXTRACTION:
            yield f"dinoray extract INPUT {store.uri}"
        elif path.startswith("clusters/"):
            yield command_for(store.uri, path) + ("" if emptied else " --update")
        else:
            yield command_for(store.uri, path) + _settings_of_index(store, path)


def _settings_of_index(store: Store, path: str) -> str:
    """What an index is made of, as options, where its manifest can be read."""
    kind, _, name = path.partition("/")
    if kind != "index":
        return ""
    try:
        manifest = read_manifest(store, name)
    except DinorayError:
        return ""
    held = manifest.holds if manifest else {}
    return "".join(f" --set index.{key}={value}" for key, value in held.items() if value)
