"""Signals end a job, but never between what it committed and what it counted."""

from __future__ import annotations

import os
import signal

import pytest

from pipelines.running.interrupts import interruptible, uninterrupted


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_at_once(which: signal.Signals) -> None:
    before = signal.getsignal(which)
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), which)
        raise AssertionError("the signal came too late")
    assert signal.getsignal(which) is before


def test_a_signal_waits_for_the_end_of_a_commit() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        with uninterrupted():
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
            done.append("the rest of the commit")
        done.append("after it")
    assert done == ["the rest of the commit"]
    with uninterrupted():
        pass  # nothing is left over


def test_a_second_signal_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible(), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal came too late")
