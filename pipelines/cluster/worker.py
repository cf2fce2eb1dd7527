"""A worker of cluster: it keeps the vectors of its row groups in memory as far as they fit, and answers with sums.

Every method can be called again with the same answer, so that Ray may restart a worker that died: what a worker keeps
is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dino_ops.kmeans import Codebook, LloydPass, PartialSums
from dino_ops.kmeans_assignment import as_tensor
from pipelines.cluster.vectors import Reading, Unit, batches_of_units, read_keys, read_vectors, unit_random
from pipelines.results.cluster_models import Level
from pipelines.results.cluster_statistics import Counting, Statistics
from pipelines.store.parquet import DataFile, new_file_name, write_parquet
from pipelines.store.schemas import ASSIGNMENTS

# Some 25 MB, held in memory until they are written.
ASSIGNMENTS_PER_FILE = 4_000_000
ASSIGNMENTS_PER_ROW_GROUP = 65_536
# Products need the rest.
VECTORS_SHARE_OF_FREE_GPU_MEMORY = 0.6


@dataclass(frozen=True)
class ClusterSetup:
    """All that a worker needs to know besides its units.

    salient_above: for votes, see Counting. device: cpu or cuda.
    """

    reading: Reading
    spherical: bool
    salient_above: float
    seed: int
    device: str
    threads: int
    cache_bytes: float


@dataclass
class WrittenFile:
    """A file of assignments, which the driver commits. distance: the sum over its rows."""

    file: DataFile
    statistics: Statistics
    images: int
    distance: float


@dataclass
class _Held:
    """What a worker keeps of a unit. parents: clusters of the level above, for the level it was computed for."""

    vectors: torch.Tensor
    salient: np.ndarray | None
    parents: dict[int, torch.Tensor] = field(default_factory=dict)


class ClusterWorker:
    """Holds some units."""

    def __init__(self, setup: ClusterSetup, units: list[Unit]) -> None:
        torch.set_num_threads(setup.threads)
        self._setup = setup
        self._units = units
        self._cache_bytes = setup.cache_bytes
        if setup.device == "cuda":
            self._cache_bytes = min(setup.cache_bytes, VECTORS_SHARE_OF_FREE_GPU_MEMORY * torch.cuda.mem_get_info()[0])
        self._held: dict[int, _Held] = {}
        self._held_bytes = 0

    def count(self) -> tuple[int, int, int]:
        """(vectors, those to train on, dimension); reads every unit once and keeps what fits."""
        total = trained = dimension = 0
        for _, held in self._each():
            count, dimension = held.vectors.shape if len(held.vectors) else (0, dimension)
            total += count
            trained += count if held.salient is None else int(held.salient.sum())
        return total, trained, dimension

    def held(self) -> tuple[int, int]:
        """(vectors kept in memory, all)."""
        return sum(len(held.vectors) for held in self._held.values()), sum(unit.rows for unit in self._units)

    def sample(self, share: float) -> np.ndarray:
        """About `share` of the vectors to train on: (n, D), the same whatever worker holds them."""
        found = []
        for unit, held in self._each():
            chosen = self._chosen(unit, held, share)
            found.append(held.vectors.cpu().numpy()[slice(None) if chosen is None else chosen])
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def sums(self, levels: Sequence[Level], share: float) -> PartialSums:
        """One pass of Lloyd's algorithm for the last of `levels`, over the vectors to train on."""
        codebooks = self._codebooks(levels)
        lloyd = LloydPass(codebooks[-1])
        for unit, held in self._each():
            vectors, parents = held.vectors, self._parents(held, codebooks[:-1])
            if (chosen := self._chosen(unit, held, share)) is not None:
                keep = torch.from_numpy(np.flatnonzero(chosen)).to(vectors.device)
                vectors = vectors[keep]
                parents = None if parents is None else parents[keep]
            lloyd.add(vectors, parents)
        return lloyd.total()

    def write(self, levels: Sequence[Level], table: str, run_id: str) -> list[WrittenFile]:
        """Assign all vectors and write them to files of the table of assignments at `table`."""
        setup = self._setup
        counting = Counting(len(levels[-1].centroids), setup.spherical, setup.salient_above)
        codebooks = self._codebooks(levels)
        written = []
        for batch in batches_of_units(self._units, ASSIGNMENTS_PER_FILE):
            rows = [self._assignments(unit, held, codebooks) for unit, held in self._each(batch)]
            whole = pa.concat_tables(rows).combine_chunks()
            if not len(whole):
                continue
            # images that were added later may come between earlier ones
            if not _in_key_order(rows):
                whole = whole.sort_by([("image_id", "ascending"), ("row", "ascending"), ("col", "ascending")])
            file = write_parquet(table, new_file_name(run_id), whole, setup.reading.options, ASSIGNMENTS_PER_ROW_GROUP)
            distance = float(whole["distance"].to_numpy().sum(dtype=np.float64))
            written.append(
                WrittenFile(file, Statistics.of(whole, counting), len(pc.unique(whole["image_id"])), distance)
            )
        return written

    def _assignments(self, unit: Unit, held: _Held, codebooks: Sequence[Codebook]) -> pa.Table:
        labels, distances = descend(held.vectors, codebooks)
        keys = read_keys(unit, self._setup.reading)
        columns = {
            **{name: keys[name] for name in keys.column_names},
            "cluster_id": pa.array(labels.to(torch.int32).cpu().numpy()),
            "distance": pa.array(distances.cpu().numpy(), pa.float32()),
        }
        return pa.table([columns[name] for name in ASSIGNMENTS.names], schema=ASSIGNMENTS)

    def _each(self, units: list[Unit] | None = None) -> Iterator[tuple[Unit, _Held]]:
        """All units, or some; the next one that is not held is read meanwhile."""
        units = self._units if units is None else units
        with ThreadPoolExecutor(1) as pool:
            absent = iter([unit for unit in units if unit.number not in self._held])
            reading = _submit(pool, self._read, next(absent, None))
            for unit in units:
                held = self._held.get(unit.number)
                if held is None:
                    # units are read in the order in which they come
                    assert reading is not None
                    held = reading.result()
                    reading = _submit(pool, self._read, next(absent, None))
                    self._keep(unit, held)
                yield unit, held

    def _read(self, unit: Unit) -> _Held:
        vectors, salient = read_vectors(unit, self._setup.reading)
        return _Held(as_tensor(vectors).to(self._setup.device), salient)

    def _keep(self, unit: Unit, held: _Held) -> None:
        size = held.vectors.nbytes
        if self._held_bytes + size <= self._cache_bytes:
            self._held[unit.number] = held
            self._held_bytes += size

    def _chosen(self, unit: Unit, held: _Held, share: float) -> np.ndarray | None:
        """Which vectors of a unit take part: (n,) bool, or None for all."""
        if share >= 1:
            return held.salient
        drawn = unit_random(unit, self._setup.seed, len(held.vectors)) < share
        return drawn if held.salient is None else drawn & held.salient

    def _parents(self, held: _Held, above: Sequence[Codebook]) -> torch.Tensor | None:
        """The cluster of each vector in the levels above, which do not change any more."""
        if not above:
            return None
        if len(above) not in held.parents:
            labels, _ = descend(held.vectors, above)
            held.parents = {len(above): labels.to(torch.int32)}
        return held.parents[len(above)]

    def _codebooks(self, levels: Sequence[Level]) -> list[Codebook]:
        return codebooks_of(levels, self._setup.spherical, self._setup.device)


def codebooks_of(levels: Sequence[Level], spherical: bool, device: str = "cpu") -> list[Codebook]:
    """Levels of a tree made ready for comparisons."""
    return [Codebook(level.centroids, spherical=spherical, offsets=level.offsets, device=device) for level in levels]


def descend(vectors: torch.Tensor, codebooks: Sequence[Codebook]) -> tuple[torch.Tensor, torch.Tensor]:
    """The cluster of each vector in the last level, and its distance: down the tree, nearest by nearest.

    vectors: (n, D). Returns (n,) int64 and (n,) float32.
    """
    labels, distances = codebooks[0].assign(vectors)
    for codebook in codebooks[1:]:
        labels, distances = codebook.assign(vectors, labels)
    return labels, distances


def _in_key_order(tables: list[pa.Table]) -> bool:
    """Whether tables, each in key order, follow each other in it."""
    ids = [table["image_id"] for table in tables if len(table)]
    return all(before[-1].as_py() <= after[0].as_py() for before, after in pairwise(ids))


def _submit(pool: ThreadPoolExecutor, read: Callable[[Unit], _Held], unit: Unit | None) -> Future[_Held] | None:
    return None if unit is None else pool.submit(read, unit)
