"""Where this program touches storage: the numbered steps at which a run is killed, or at which another one runs."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock


def storage_steps(*, reads: bool = False) -> list[tuple[Any, str]]:
    """Where this program touches storage, as (owner, name of a function). reads: looks at it too."""
    import faiss
    import pyarrow.parquet as pq
    from deltalake import DeltaTable
    from fsspec.implementations.local import LocalFileSystem
    from s3fs import S3FileSystem

    from pipelines.store import publishing, snapshots
    from pipelines.store.transaction_log import TransactionLog

    found: list[tuple[Any, str]] = [(os, name) for name in ("link", "replace", "unlink", "remove")]
    found += [(LocalFileSystem, "pipe_file"), (pq.ParquetWriter, "close"), (faiss, "write_index")]
    found += [(S3FileSystem, name) for name in ("_pipe_file", "_put_file", "_rm_file")]
    found += [(DeltaTable, "create"), (DeltaTable, "create_write_transaction")]
    if reads:
        found += [(TransactionLog, "listing"), (TransactionLog, "read")]
        found += [(snapshots, "delta_of"), (publishing, "delta_of")]
    return found


@contextmanager
def at_step(number: int, act: Callable[[], object], *, reads: bool = False) -> Iterator[list[str]]:
    """Have `act` called before the step with this number (from 0) is taken; the names of all steps until then, `act`'s
    own left out."""
    taken: list[str] = []
    inside: list[bool] = []

    from s3fs import S3FileSystem

    def before(name: str) -> None:
        if inside:
            return
        taken.append(name)
        if len(taken) == number + 1:
            inside.append(True)
            try:
                act()
            finally:
                inside.pop()

    def disturbed(original: Any, name: str) -> Any:
        @functools.wraps(original)  # drivers are asked for their parameters
        def step(*arguments: Any, **named: Any) -> Any:
            before(name)
            return original(*arguments, **named)

        @functools.wraps(original)
        async def asynchronous_step(*arguments: Any, **named: Any) -> Any:
            # in a thread, since what `act` does waits for this loop
            await asyncio.to_thread(before, name)
            return await original(*arguments, **named)

        return asynchronous_step if inspect.iscoroutinefunction(original) else step

    with ExitStack() as stack:
        stack.callback(S3FileSystem.clear_instance_cache)
        for owner, name in storage_steps(reads=reads):
            original = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, disturbed(original, name)))
        S3FileSystem.clear_instance_cache()  # its instances took hold of their methods when they were made
        yield taken
