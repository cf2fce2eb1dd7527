"""Arrays in a file come back as they were, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.store.arrays import npz_bytes, read_npz
from pipelines.store.parquet import DamagedFile


def test_arrays_come_back(tmp_path: Path) -> None:
    arrays = {"centroids": np.eye(3), "names": np.array(["a", "ä"]), "empty": np.zeros((0, 4), np.float32)}
    (tmp_path / "model.npz").write_bytes(npz_bytes(arrays))
    read = read_npz(str(tmp_path / "model.npz"), {})

    assert read is not None and read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], array) and read[name].dtype == array.dtype for name, array in arrays.items())
    assert read_npz(str(tmp_path / "nowhere.npz"), {}) is None


def test_a_flipped_bit_is_a_sentence_or_changes_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {"centroids": random.standard_normal((4, 6)), "about": np.array('{"k": 4}')}
    file, sound = tmp_path / "model.npz", npz_bytes(arrays)
    found = 0
    for at in range(len(sound)):
        flipped = bytearray(sound)
        flipped[at] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        try:
            read = read_npz(str(file), {})
        except DamagedFile as error:
            assert str(file) in str(error) and len(str(error).splitlines()) == 1
            found += 1
        else:
            assert read is not None
            assert all(np.array_equal(read[name], arrays[name]) for name in read), f"byte {at}"
    assert found > len(sound) / 2


@pytest.mark.parametrize("content", [b"", b"no arrays", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_file_of_arrays_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.npz").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"model\.npz is damaged"):
        read_npz(str(tmp_path / "model.npz"), {})
