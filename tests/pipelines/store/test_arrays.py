"""Arrays in a file come back as they were, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flipped_bits import flipped_bits

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
    file, found = tmp_path / "model.npz", 0
    file.write_bytes(npz_bytes(arrays))
    for at in flipped_bits(file, range(size := file.stat().st_size)):
        try:
            read = read_npz(str(file), {})
        except DamagedFile as error:
            assert str(file) in str(error) and len(str(error).splitlines()) == 1
            found += 1
        else:
            assert read is not None
            assert all(np.array_equal(read[name], arrays[name]) for name in read), f"byte {at}"
    assert found > size / 2


@pytest.mark.parametrize("content", [b"", b"no arrays", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_file_of_arrays_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.npz").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"model\.npz is damaged"):
        read_npz(str(tmp_path / "model.npz"), {})
