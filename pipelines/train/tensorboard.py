"""Curves as TensorBoard reads them: event files of scalars."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

NO_CURVES = ("step", "time")


class EventFile:
    """A new file in `folder`. TensorBoard hides what earlier files have after `step` steps.

    Everything is written by the caller's own thread, so that a full disk is an OSError there; tensorboardX's
    SummaryWriter would lose its thread and wait for it forever.
    """

    def __init__(self, folder: str, step: int) -> None:
        os.makedirs(folder, exist_ok=True)
        # tensorboardX names files by the second and would write over one of the same second; the nanoseconds keep them
        # in the order in which TensorBoard reads them
        suffix = f".{time.time_ns()}.{uuid.uuid4().hex}"
        self._writer = EventsWriter(os.path.join(folder, "events"), filename_suffix=suffix)
        self._writer.write_event(Event(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START)))

    def add(self, record: dict[str, Any]) -> None:
        """Note a record of the log: its numbers become curves over `step`."""
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if isinstance(value, int | float) and name not in NO_CURVES
        ]
        self._writer.write_event(Event(step=record["step"], wall_time=record["time"], summary=Summary(value=values)))

    def flush(self) -> None:
        """Raises OSError."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
