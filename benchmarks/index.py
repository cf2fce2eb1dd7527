"""The index: recall against exact search for every kind, and what adding 1,000 images to 100,000 costs.

make bench        (this part: about ten minutes, nearly all of it building graphs)
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.embedded import add_embeddings
from benchmarks.photos import TEST_DATA
from benchmarks.results import Row, report
from dino_ops.nearest import Kind, NearestIndex, search_all, training_size, unit
from pipelines.index import job as index
from pipelines.results.indices import DEAD, Part, read_manifest, read_parts
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config
from pipelines.store.store import Store

WORK = Path(__file__).with_name("work")
COUNT, ADDED, QUERIES, TOP = 100_000, 1_000, 500, 10
PHOTOS = 40
# The last update brings a graph's segments above a tenth of it, and they are merged into it.
UPDATES = 11
# A ViT-Ti has 192, a ViT-S 384.
DIMENSIONS = (64, 192, 384)
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivfpq")
WEIGHTS = TEST_DATA / "weights" / "deit_tiny_patch16_224_state_dict.pth"


def main(parts: Sequence[str]) -> None:
    """parts: `patches` for those of photographs, and dimensions of made-up embeddings; default all."""
    for part in parts or ("patches", *map(str, DIMENSIONS)):
        if part != "patches":
            vectors = _clustered(COUNT + UPDATES * ADDED + QUERIES, int(part))
            rows = [row for kind in KINDS for row in one_kind(kind, vectors)]
            report(f"index of {COUNT:,} images, embeddings of {part} values", rows)
        elif WEIGHTS.exists():
            patches = _patches_of_photos()
            rows = [_recall_of_patches(kind, patches) for kind in KINDS]
            report(f"index of {len(patches) - QUERIES:,} patches of photographs, {patches.shape[1]} values", rows)


def one_kind(kind: Kind, vectors: np.ndarray) -> list[Row]:
    """Recall of a kind, and additions in parts of a rebuild. All are whole jobs, from opening the store to the report.

    A rebuild reads, trains and adds everything, and writes it. Loading FAISS and the package is in neither.
    """
    held, queries = vectors[:-QUERIES], vectors[-QUERIES:]
    config = load_config(overrides=["model.weights=random", f"index.kind={kind}"])
    store = _store(held[:COUNT], config)
    rebuild = _seconds_of_job(store, config, "bench")
    if kind == "flat":  # it is cheap enough to repeat, and the first one warms up
        rebuild = statistics.median(_seconds_of_job(store, config, f"again{number}") for number in range(3))
    in_memory = _seconds_in_memory(store, held[COUNT : COUNT + ADDED])
    updates = []
    for first in range(COUNT, len(held), ADDED):
        add_embeddings(store, f"run{first}", first, held[first : first + ADDED])
        updates.append(_seconds_of_job(store, config, "bench"))
        if first == COUNT:
            recall, per_second = _recall_of_job(store, held[: first + ADDED], queries)
    usual, mean, most = statistics.median(updates), statistics.mean(updates), max(updates)
    what = f"{kind}: {ADDED:,} added / rebuild"
    return [
        Row(f"{kind}: recall@{TOP}", recall, ">= 0.95", f"base and a segment; {per_second:,.0f} queries/s"),
        Row(what, usual / rebuild, "<= 0.05", f"whole job: {usual * 1e3:,.0f} ms and {rebuild:.2f} s"),
        Row(f"{what}, mean of {UPDATES}", mean / rebuild, "", f"merges included; the longest update took {most:.2f} s"),
        Row(f"{what}, in memory", in_memory / rebuild, "", f"into the base itself: {in_memory * 1e3:,.0f} ms"),
    ]


def _store(embeddings: np.ndarray, config: Config) -> Store:
    folder = WORK / "index"
    shutil.rmtree(folder, ignore_errors=True)
    store = Store.create(str(folder), config)
    for first in range(0, len(embeddings), 10_000):
        add_embeddings(store, "first", first, embeddings[first : first + 10_000])
    return store


def _seconds_of_job(store: Store, config: Config, name: str) -> float:
    return _seconds(lambda: index.run(config, store=store.uri, name=name))


def _parts(store: Store) -> list[Part]:
    manifest = read_manifest(store, "bench")
    assert manifest is not None
    return read_parts(store, "bench", manifest, DEAD.empty_table())


def _seconds_in_memory(store: Store, vectors: np.ndarray) -> float:
    (base,) = _parts(store)
    return _seconds(lambda: base.nearest.add(vectors, np.arange(COUNT, COUNT + len(vectors))))


def _recall_of_job(store: Store, held: np.ndarray, queries: np.ndarray) -> tuple[float, float]:
    """Recall of the stored index against exact search, and queries a second; images are called by their number."""
    parts = _parts(store)
    started = time.perf_counter()
    _, ids = search_all([part.nearest for part in parts], queries, TOP)
    per_second = len(queries) / (time.perf_counter() - started)
    numbers = np.concatenate([part.images["image_id"].to_numpy().astype(int) for part in parts])
    return _recall(numbers[ids], held, queries), per_second


def _recall(found: np.ndarray, held: np.ndarray, queries: np.ndarray) -> float:
    """The part of the TOP nearest that was found. found: (n, TOP) positions in `held`."""
    exact = np.argsort(-(unit(queries) @ unit(held).T), axis=1)[:, :TOP]
    return float(np.mean([len(set(a) & set(b)) / TOP for a, b in zip(found, exact, strict=True)]))


def _recall_of_patches(kind: Kind, patches: np.ndarray) -> Row:
    held, queries = patches[:-QUERIES], patches[-QUERIES:]
    sample = held[: training_size(len(held))]  # patches are shuffled
    nearest = NearestIndex.create(kind, held.shape[1], len(held), sample)
    build = _seconds(lambda: nearest.add(held, np.arange(len(held))))
    recall = _recall(nearest.search(queries, TOP)[1], held, queries)
    return Row(f"{kind}: recall@{TOP}", recall, ">= 0.95", f"added in {build:.1f} s")


def _patches_of_photos() -> np.ndarray:
    """Patch descriptors (n, 192) float32 of DeiT-Ti, stride 8, in random order."""
    from dino_ops.extractor import Extractor

    extractor = Extractor("deit_tiny_patch16_224", str(WEIGHTS), stride=8, saliency=False)
    found: list[np.ndarray] = []
    for photo in sorted((TEST_DATA / "photos").glob("*.JPEG")):
        descriptor = extractor(photo.read_bytes()).descriptor
        assert descriptor is not None
        found.append(descriptor.reshape(-1, descriptor.shape[-1]))
        if len(found) == PHOTOS:
            break
    patches = np.concatenate(found)
    return patches[np.random.default_rng(0).permutation(len(patches))]


def _clustered(count: int, dimension: int) -> np.ndarray:
    """Unit vectors around centres, 50 each: (count, dimension) float32."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((count // 50, dimension), np.float32)
    noise = 0.6 * generator.standard_normal((count, dimension), np.float32)
    return unit(centres[generator.integers(0, len(centres), count)] + noise)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(sys.argv[1:])
