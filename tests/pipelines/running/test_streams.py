"""Reading what Ray Data makes: nothing of its reading is left when the reader has stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipelines.running.streams import RAY_DATA_READING_THREAD_NAME, read_blocks


class Blocks:
    """A dataset whose iterator leaves a thread behind that ends a little later, as Ray Data's does."""

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        stopped = threading.Event()

        def read_ahead() -> None:
            stopped.wait()
            time.sleep(0.3)

        threading.Thread(target=read_ahead, name=RAY_DATA_READING_THREAD_NAME, daemon=True).start()
        try:
            for number in range(3):
                yield pa.table({"number": [number]})
        finally:
            stopped.set()


@pytest.mark.parametrize("blocks", [1, 3])
def test_threads_end_before_the_stream_does(blocks: int) -> None:
    """A Ray Data thread that outlives Ray ends the whole process, silently."""
    stream = read_blocks(Blocks())
    found = [next(stream)["number"][0].as_py() for _ in range(blocks)]
    assert any(thread.name == RAY_DATA_READING_THREAD_NAME for thread in threading.enumerate())
    stream.close()
    assert found == list(range(blocks))
    assert not any(thread.name == RAY_DATA_READING_THREAD_NAME for thread in threading.enumerate())


def test_threads_of_others_are_not_waited_for() -> None:
    stop = threading.Event()
    threading.Thread(target=stop.wait, name=RAY_DATA_READING_THREAD_NAME, daemon=True).start()
    began = time.monotonic()
    assert len(list(read_blocks(Blocks()))) == 3
    assert time.monotonic() - began < 5
    stop.set()


@pytest.mark.usefixtures("ray")
def test_they_are_called_so_by_the_ray_that_is_installed() -> None:
    import ray.data

    stream = read_blocks(ray.data.from_arrow([pa.table({"number": [number]}) for number in range(4)]))
    next(stream)
    assert any(thread.name == RAY_DATA_READING_THREAD_NAME for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name == RAY_DATA_READING_THREAD_NAME for thread in threading.enumerate())
