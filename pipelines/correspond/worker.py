"""What runs on workers: reading a block of images, and matching pairs of them into files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.results.matches import PAIR_VERSION_COLUMNS, MatchReport
from pipelines.settings.sections import Config
from pipelines.store.parquet import new_file_name, write_parquet
from pipelines.store.patches import ImagePlace, PatchMap, PatchMaps, read_patch_maps
from pipelines.store.schemas import MATCHES, PAIRS


@dataclass(frozen=True)
class MatchSetup:
    """All that a worker needs to know; small, since it travels with every task.

    tables: matches/NAME. device: cpu or cuda.
    """

    store: str
    tables: str
    run_id: str
    config: Config
    device: str

    @property
    def half(self) -> bool:
        """Descriptors are stored rounded to half precision, so holding them as such loses nothing."""
        return self.config.store.dtype == "float16"


@dataclass(frozen=True)
class PairRow:
    """A pair to match, and what else its row says."""

    image_a: str
    image_b: str
    score: float | None
    source: str
    run_id_a: str
    run_id_b: str


@dataclass(frozen=True)
class LoadedImages:
    """A block of images in Ray's object store. name: of this reading, so that it is counted once."""

    name: str
    maps: PatchMaps
    seconds: float


def load_images(setup: MatchSetup, images: list[ImagePlace]) -> LoadedImages:
    """Read the descriptors of a block of images."""
    started = time.monotonic()
    column = setup.config.correspond.descriptor
    maps = read_patch_maps(setup.store, images, column, setup.half, setup.config.storage.options)
    return LoadedImages(new_file_name(setup.run_id), maps, time.monotonic() - started)


def match_pairs(setup: MatchSetup, pairs: list[PairRow], *blocks: LoadedImages) -> MatchReport:
    """Match pairs of images that lie in `blocks`, and write a file of pairs and one of matches."""
    started = time.monotonic()
    found = [match_pair(setup, pair, _map_of(pair.image_a, blocks), _map_of(pair.image_b, blocks)) for pair in pairs]
    matched = time.monotonic()
    order = sorted(range(len(pairs)), key=lambda at: (pairs[at].image_a, pairs[at].image_b))
    rows = pa.concat_tables([found[at][1] for at in order])
    name = new_file_name(setup.run_id)
    matches = None
    if len(rows):
        matches = write_parquet(storage.join(setup.tables, "matches"), name, rows, setup.config.storage.options)
    pair_rows = []
    for at in order:
        mutual, kept = found[at][0], len(found[at][1])
        pair_rows.append({**vars(pairs[at]), "mutual": mutual, "kept": kept, "shard": name if kept else None})
    table = pa.Table.from_pylist(pair_rows, schema=PAIRS)
    written = write_parquet(storage.join(setup.tables, "pairs"), name, table, setup.config.storage.options)
    return MatchReport(
        kept={(pair.image_a, pair.image_b): len(rows) for pair, (_, rows) in zip(pairs, found, strict=True)},
        rows=table.select(PAIR_VERSION_COLUMNS),
        pairs=written,
        matches=matches,
        bytes_written=written.size + (matches.size if matches else 0),
        reads={block.name: (block.maps.bytes_read, block.seconds) for block in blocks},
        seconds={"match": matched - started, "write": time.monotonic() - matched},
    )


def match_pair(setup: MatchSetup, pair: PairRow, a: PatchMap, b: PatchMap) -> tuple[int, pa.Table]:
    """(mutual neighbours found, rows of MATCHES: the selected ones by rank, then the others)."""
    from dino_ops.correspondences import find_correspondences

    asked = setup.config.correspond
    found = find_correspondences(
        _on_device(a.descriptor, setup.device),
        _on_device(b.descriptor, setup.device),
        a.saliency,
        b.saliency,
        num_pairs=asked.num_pairs,
        saliency_threshold=asked.saliency_threshold,
        binned=asked.binned,
        foreground=asked.foreground,
        seed=asked.seed,
    )
    chosen, ranks = found.selected, np.arange(len(found.selected), dtype=np.int32)
    if asked.keep == "all":
        others = np.setdiff1d(np.arange(len(found)), chosen)
        chosen = np.concatenate([chosen, others])
        ranks = np.concatenate([ranks, np.full(len(others), -1, np.int32)])
    row_a, col_a = np.divmod(found.cell_a[chosen], a.saliency.shape[1])
    row_b, col_b = np.divmod(found.cell_b[chosen], b.saliency.shape[1])
    columns = {
        "image_a": pa.array([pair.image_a] * len(chosen), pa.string()),
        "image_b": pa.array([pair.image_b] * len(chosen), pa.string()),
        "row_a": row_a,
        "col_a": col_a,
        "row_b": row_b,
        "col_b": col_b,
        "y_a": a.y[row_a, col_a],
        "x_a": a.x[row_a, col_a],
        "y_b": b.y[row_b, col_b],
        "x_b": b.x[row_b, col_b],
        "similarity": found.similarity[chosen],
        "saliency": found.saliency[chosen],
        "rank": ranks,
    }
    return found.mutual, pa.table(columns).cast(MATCHES)


def _map_of(image_id: str, blocks: tuple[LoadedImages, ...]) -> PatchMap:
    holder = next(block for block in blocks if image_id in block.maps.places)
    return holder.maps.of(image_id)


def _on_device(descriptor: np.ndarray, device: str) -> Any:
    import torch

    # Ray shares arrays read-only, of which torch warns; nothing here writes to them
    return torch.tensor(descriptor) if device == "cpu" else torch.tensor(descriptor, device=device)
