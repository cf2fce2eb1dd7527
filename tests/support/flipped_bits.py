"""Files in which a bit has flipped, as disks and memory do it now and then."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np


def flip_bit(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def flipped_bits(path: Path, positions: Collection[int], count: int | None = None, seed: int = 0) -> Iterator[int]:
    """Positions at which a file is read with a bit of that byte flipped, chosen by chance; it is sound in the end.

    count: how many of the positions are tried, chosen by chance too; all where nobody says.
    """
    sound, random = path.read_bytes(), np.random.default_rng(seed)
    chosen = positions if count is None else random.choice(np.asarray(positions), count, replace=False)
    for at in chosen:
        path.write_bytes(sound)
        flip_bit(path, int(at), int(random.integers(8)))
        yield int(at)
    path.write_bytes(sound)
