"""Arrays of a set of images: in memory while they fit, on the worker's disk beyond that."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import numpy as np


class SpilledArrays(Sequence[np.ndarray]):
    """A sequence of arrays that holds at most `budget` bytes in memory; the rest lies in a folder of its own.

        with SpilledArrays(budget=2**30) as arrays:
            arrays.append(array)

    An array on disk is read again each time it is used.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._held: list[np.ndarray | Path] = []
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, array: np.ndarray) -> None:
        if self._bytes + array.nbytes <= self._budget:
            self._bytes += array.nbytes
            self._held.append(array)
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="dinoray-")
        file = Path(self._folder.name, f"{len(self._held)}.npy")
        np.save(file, array)
        self._held.append(file)

    @property
    def bytes_held(self) -> int:
        """Bytes in memory."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._held)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        held = self._held[index]
        return np.load(held) if isinstance(held, Path) else held

    def __enter__(self) -> SpilledArrays:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = []
        if self._folder:
            self._folder.cleanup()
