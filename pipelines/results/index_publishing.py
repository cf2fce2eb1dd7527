"""An index changes by a transaction that points to another manifest, and to the files which that one names."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from pipelines import storage
from pipelines.errors import DinorayError
from pipelines.results.indices import (
    SCHEMA_VERSION,
    Manifest,
    files_present,
    highest_number,
    index_path,
    index_uri,
    is_ours,
    manifest_file,
    manifest_json,
    read_manifest,
    read_replaced_manifest,
    remove_files,
)
from pipelines.store.changes import Change, Pointer
from pipelines.store.checksums import checksum_of
from pipelines.store.snapshots import Snapshot
from pipelines.store.store import Store
from pipelines.store.transactions import transact


class AnotherUpdate(Exception):
    """Another run changed the index since this one read it."""


def publish(store: Store, name: str, manifest: Manifest, before: Manifest | None, pointer: Pointer | None) -> Manifest:
    """Have readers find an index from now on, whose files are written, and remove what is no longer needed.

    What lies in its folder and is named neither by it nor by the one that it replaces goes: older indices, what killed
    runs left, and what a run wrote that began from an older manifest and can no longer publish. What the replaced one
    names stays until the next update, for searches that are reading it.

    before, pointer: the index that this one was made from, and where the store's log pointed then.

    Returns the manifest with the number that it got.

    Raises AnotherUpdate where the log points elsewhere by now; nothing was changed then.
    """
    path = index_path(name)
    try:
        manifest, data = _written(store, name, manifest)
    except FileNotFoundError:  # another run was first, and took the file for a leftover before it had its name
        raise AnotherUpdate from None
    file = manifest_file(manifest.number)
    named = sorted(f"{path}/{one}" for one in manifest.files)
    moved = Pointer(f"{path}/{file}", checksum_of(data), tuple(named))
    needed = manifest.files | {file} | (before.files | {manifest_file(before.number)} if before else set())

    def build(current: Snapshot) -> Change:
        if current.pointers.get(path) != pointer:
            raise AnotherUpdate
        unneeded = {one for one in files_present(store, name) - needed if is_ours(one)}
        return Change(pointers={path: moved}, sweep=[f"{path}/{one}" for one in sorted(unneeded)])

    try:
        transact(store.log, build, run_id=manifest.run_id, command="index")
    except AnotherUpdate:
        remove_unneeded(store, name, {file})
        raise
    return manifest


def remove_unneeded(store: Store, name: str, files: set[str]) -> None:
    """Remove those files of an index that the valid manifest and the one that it replaced do not name.

    What stays goes with the next update.
    """
    with contextlib.suppress(DinorayError, OSError):
        current = read_manifest(store, name)
        manifests = [current, read_replaced_manifest(store, name, current) if current else None]
        live = {file for one in manifests if one for file in (*one.files, manifest_file(one.number))}
        remove_files(store, name, files - live)


def _written(store: Store, name: str, manifest: Manifest) -> tuple[Manifest, bytes]:
    """Write a manifest under a number that no other has."""
    number = manifest.number - 1
    while True:
        number = max(number, highest_number(files_present(store, name))) + 1
        manifest = replace(manifest, number=number, schema_version=SCHEMA_VERSION)
        data = manifest_json(manifest)
        uri = storage.join(index_uri(store.uri, name), manifest_file(number))
        if storage.write_once(uri, data, store.config.storage.options):
            return manifest, data
