"""Ctrl-C and SIGTERM, which schedulers send: both end a job the same way, and never in the middle of a commit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Deferral:
    """How many `uninterrupted` blocks are open, for which an interruption has to wait, and whether one does."""

    open_blocks = 0
    pending = False


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # a second signal does not wait
    if _Deferral.open_blocks and not _Deferral.pending:
        _Deferral.pending = True
    else:
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within: either signal raises KeyboardInterrupt. In other threads than the main one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {one: signal.signal(one, _interrupt) for one in _SIGNALS}
    try:
        yield
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within: a signal waits for the end of the block, so that what the block did and what it counted agree."""
    _Deferral.open_blocks += 1
    try:
        yield
    finally:
        _Deferral.open_blocks -= 1
        if _Deferral.pending and not _Deferral.open_blocks:
            _Deferral.pending = False
            raise KeyboardInterrupt
