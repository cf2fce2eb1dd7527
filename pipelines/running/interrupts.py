"""Ctrl-C and SIGTERM, which schedulers send: both end a job the same way, and never in the middle of a commit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Deferral:
    """Whether an interruption has to wait, and whether one does."""

    waiting_for = 0  # how many `uninterrupted` blocks are open
    pending = False


def _interrupt(signum: int, frame: FrameType | None) -> None:
    if _Deferral.waiting_for and not _Deferral.pending:  # a second signal does not wait
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
    _Deferral.waiting_for += 1
    try:
        yield
    finally:
        _Deferral.waiting_for -= 1
        if _Deferral.pending and not _Deferral.waiting_for:
            _Deferral.pending = False
            raise KeyboardInterrupt
