"""A bit that flips in a Parquet file of a store is a sentence that names the file, or changes nothing that is read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from flipped_bits import flip_bit, flipped_bits
from hand_made import add_described, add_failure, described
from small_runs import settings

from pipelines.errors import JobError
from pipelines.store.parquet import DamagedFile, open_parquet
from pipelines.store.store import Store
from pipelines.store.table import Table
from pipelines.upkeep import verify

FLIPS = 60


@pytest.fixture
def store(tmp_path: Path) -> Store:
    random = np.random.default_rng(0)
    made = Store.create(str(tmp_path / "store"), settings())
    images = {f"{at:03}.jpg": described(random.standard_normal((5, 6, 192))) for at in range(12)}
    add_described(made, "20260101T000000Z-000000", images)
    add_failure(made, "20260101T000000Z-000001", "broken.jpg")
    return made


def only_file(table: Table) -> tuple[Path, str]:
    (name,) = table.files()
    return Path(table.uri) / name, name


def data_bytes(path: Path) -> range:
    """Where a file's pages are: between the magic bytes and the footer."""
    data = path.read_bytes()
    return range(4, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))


@pytest.mark.parametrize("name", ["images", "patches", "failures"])
def test_a_flipped_bit_is_a_sentence_or_changes_nothing(name: str, store: Store) -> None:
    table = getattr(store, name)
    table.refresh()
    path, file = only_file(table)
    expected = table.read_file(file)
    found, unchanged = 0, 0
    for at in flipped_bits(path, data_bytes(path), FLIPS):
        try:
            assert table.read_file(file).equals(expected), f"another value is read after byte {at} changed"
            unchanged += 1
            assert not verify.run(store.config, store=store.uri, deep=True).problems
        except DamagedFile as error:
            found += 1
            assert str(path) in str(error) and "dinoray repair" in str(error)
            (problem,) = verify.run(store.config, store=store.uri, deep=True).problems[:1]
            assert file in problem
    assert found > unchanged


def test_every_page_has_a_checksum(store: Store) -> None:
    """Checked by cutting bits out of each column's values, with a reader that looks at nothing but that column."""
    store.patches.refresh()
    path, _ = only_file(store.patches)
    sound = path.read_bytes()
    footer = pq.ParquetFile(path).metadata
    for index in range(footer.num_columns):
        column = footer.row_group(0).column(index)
        path.write_bytes(sound)
        flip_bit(path, column.data_page_offset + column.total_compressed_size // 2)
        with pytest.raises(DamagedFile), open_parquet(str(path)) as parquet:
            parquet.read([column.path_in_schema])


def test_a_file_without_checksums_is_read(store: Store) -> None:
    store.patches.refresh()
    path, file = only_file(store.patches)
    rows = store.patches.read_file(file)
    pq.write_table(rows, path, compression="zstd", store_schema=False)

    assert store.patches.read_file(file).equals(rows)


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "text"])
def test_a_damaged_file_is_one_sentence(damage: str, store: Store) -> None:
    store.patches.refresh()
    path, file = only_file(store.patches)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:1000], "empty": b"", "text": b"no parquet file" * 9}[damage])

    with pytest.raises(JobError) as caught:
        store.patches.read_file(file)
    assert str(path) in str(caught.value) and "dinoray repair" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_file_stays_one_on_its_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedFile("/store/images/part-1.parquet", "it ends too soon")))

    assert (type(error), error.uri, error.found) == (DamagedFile, "/store/images/part-1.parquet", "it ends too soon")
    assert isinstance(error, OSError) and isinstance(error, JobError) and "it ends too soon" in str(error)
