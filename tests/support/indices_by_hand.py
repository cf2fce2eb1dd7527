"""Indices as other versions or broken runs leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.results.indices import index_path, valid_manifest
from pipelines.store.changes import Change, Pointer
from pipelines.store.checksums import checksum_of
from pipelines.store.store import Store
from pipelines.store.transactions import transact


def change_manifest(store: Store, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Have an index say something else, in the file of its manifest and in what the store's log says of that."""
    path = f"{index_path(name)}/{valid_manifest(store, name)}"
    file = Path(store.uri, path)
    content = json.loads(file.read_text())
    change(content)
    data = json.dumps(content).encode()
    file.write_bytes(data)
    moved = Change(pointers={index_path(name): Pointer(path, checksum_of(data))})
    transact(store.log, lambda _: moved, run_id="hand", command="index")
