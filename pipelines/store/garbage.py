"""Files that nobody names: what dead workers left, and what transactions replaced longer ago than the retention.

They are listed here and go by a transaction of their own (`Change.sweep`), so that a change that was about to name one
finds it gone before it is written, and is never written with it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator

from pipelines.storage.errors import reaching
from pipelines.storage.files import filesystem, join
from pipelines.storage.filesystems import is_local, local_path, modified_at
from pipelines.store.damage import DamagedLog
from pipelines.store.snapshots import Snapshot
from pipelines.store.transaction_log import FOLDER, SHORTEST_KEPT_SECONDS

_LOG = "_delta_log"
# Beside what pointers name: names with a run in them, and manifests of indices from before transactions.
_OURS = re.compile(r".*\d{8}T\d{6}Z-[0-9a-f]{6}.*|manifest-\d+\.json(\.\w+\.partial)?")


def garbage(current: Snapshot, retention_hours: float, begun: Collection[str] = ()) -> list[str]:
    """Paths, in the store, of files in its tables' folders and beside what its pointers name that are named by nobody.

    current: the newest snapshot, as a `build` gets it. begun: folders of results that no pointer has led to yet.

    Spared is what
    - a table of the snapshot names, or what its pointers point at;
    - a transaction of the last `retention_hours` brought, took away or pointed at, since readers may be at it;
    - was written in that time, since its writer may be about to name it (what belongs to a log: within an hour, too);
    - lies behind a link, or in a folder that is no table's and no pointer's.
    Nothing is listed where the log of transactions does not reach back that far: in a store from before transactions,
    until it does.

    Times are by the clocks of the storage and of this machine. Where one is wrong, a run may fail that wrote a file too
    long ago, or a reader of an old snapshot: nothing that is committed is lost.
    """
    log = current.log
    began = log.clock() - retention_hours * 3600
    named, reaches_back = set[str](), False
    folders = set(begun)
    listing = log.listing(times=True)
    for number in reversed(listing.numbers):
        try:
            transaction = log.read(number)
        except DamagedLog:
            transaction = None
        if transaction is None:
            break  # damaged, or cut at this moment, and so are those before it
        for pointer in transaction.pointers.values():
            named |= set(pointer.every_file)
            folders |= {path.rpartition("/")[0] for path in pointer.every_file if "/" in path}
        if _is_older(listing.modified.get(number), began):
            reaches_back = True  # its pointers were in force when the retention began; what it took away was gone
            break
        for entry in transaction.tables:
            named |= {f"{entry.table}/{path}" for path in [*(file.path for file in entry.add), *entry.remove]}
    if not reaches_back:
        return []
    found = dict(_files(current))
    tables = {path.partition(f"/{_LOG}/")[0] for path in found if f"/{_LOG}/" in path}
    for table in list(tables):
        try:
            named |= {f"{table}/{path}" for path in current.files(table)}
        except DamagedLog:
            tables.remove(table)  # nobody can say which files it names
    # what a log's writer is at this moment about to give its name has none yet
    began_of_logs = min(began, log.clock() - SHORTEST_KEPT_SECONDS)
    ours = [path for path in found if _may_go(path, tables, folders)]
    return sorted(
        path
        for path in ours
        if path not in named and _is_older(found[path], began_of_logs if _is_of_a_log(path) else began)
    )


def _may_go(path: str, tables: set[str], folders: set[str]) -> bool:
    """Whether a file is where only this program writes."""
    folder, _, name = path.rpartition("/")
    if folder == FOLDER:
        return name.endswith(".partial") or name.startswith("probe-")
    if folder.endswith(f"/{_LOG}"):
        return "#" in name  # a commit that delta-rs had not given its name yet
    return (folder in tables and name.endswith(".parquet")) or (folder in folders and bool(_OURS.fullmatch(name)))


def _is_of_a_log(path: str) -> bool:
    folder = path.rpartition("/")[0]
    return folder == FOLDER or folder.endswith(f"/{_LOG}")


def _is_older(modified: float | None, began: float) -> bool:
    return modified is not None and modified < began


def _files(current: Snapshot) -> Iterator[tuple[str, float | None]]:
    """Every file of a store by its path in it, and when it was written; links are not followed."""
    log = current.log
    if is_local(log.uri):
        root = local_path(log.uri)
        for folder, _, names in os.walk(root, followlinks=False):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if not os.path.islink(path):
                        yield os.path.relpath(path, root), os.lstat(path).st_mtime
        return
    fs, root = filesystem(log.uri, log.options)
    with reaching(log.uri):
        for path, info in fs.find(root, detail=True).items():
            yield path.removeprefix(join(root, "")), modified_at(info)
