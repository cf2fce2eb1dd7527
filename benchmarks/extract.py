"""The extraction job and the extractor, against a bare model, a DataLoader loop and the published way of computing.

make bench        (about ten minutes on two cores)
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from deltalake import DeltaTable

from benchmarks import dataloader_way, published_way
from benchmarks.memory import run_and_measure
from benchmarks.photos import TEST_DATA, describe_sources, photo_folder
from benchmarks.results import Row, report
from dino_ops import Extractor
from dino_ops.images import PreparedImage
from pipelines.extract import job as extract
from pipelines.settings.loading import load_config

WORK = Path(__file__).with_name("work")
MODEL = "dino_vits16"
SMALL_MODEL = "vit_tiny_patch16_224"
CORES = torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of the images: to see that it runs")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    share = 8 if arguments.quick else 1
    rows: list[Row] = []
    for name in arguments.only:
        for row in PARTS[name](share):
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    report(f"extract ({describe_sources()}{', quick' if arguments.quick else ''})", rows)


def throughput(share: int) -> list[Row]:
    """(a) The whole job against the bare model, and against a DataLoader loop that does the same."""
    folder = photo_folder(WORK / "throughput", 960 // share)
    extractor = Extractor(MODEL, "random", device="cpu")
    bare = [_bare_rate(extractor, folder, 240 // share)]
    job = _job_rate(folder)
    bare.append(_bare_rate(extractor, folder, 240 // share))
    loader = dataloader_way.images_per_second(extractor, folder, WORK / "dataloader", CORES)
    bare.append(_bare_rate(extractor, folder, 240 // share))
    # each against the bare loops just before and after it, since the machine's speed drifts
    beside_job, beside_loader = statistics.mean(bare[:2]), statistics.mean(bare[1:])
    return [
        Row(
            "(a) extract / bare model", job / beside_job, ">= 0.80", f"{job:.1f} and {beside_job:.1f} images/s, {MODEL}"
        ),
        Row(
            "(a) extract / DataLoader loop",
            (job / beside_job) / (loader / beside_loader),
            ">= 1.0",
            f"the loop: {loader:.1f} images/s, {loader / beside_loader:.2f} of the bare model beside it",
        ),
    ]


def _bare_rate(extractor: Extractor, folder: Path, count: int) -> float:
    """Images a second of the model alone, on tensors that are ready, with all cores."""
    torch.set_num_threads(CORES)
    prepared = [extractor.prepare(path) for path in sorted(folder.iterdir())[:count]]
    batches = [torch.from_numpy(np.stack(batch)) for batch in _by_shape(prepared, 8)]
    extractor.forward(batches[0])
    started = time.perf_counter()
    for batch in batches:
        extractor.forward(batch)
    return sum(map(len, batches)) / (time.perf_counter() - started)


def _by_shape(prepared: list[PreparedImage], size: int) -> list[list[np.ndarray]]:
    shapes: dict[tuple[int, ...], list[np.ndarray]] = {}
    for image in prepared:
        shapes.setdefault(image.pixels.shape, []).append(image.pixels)
    return [group[at : at + size] for group in shapes.values() for at in range(0, len(group), size)]


def _job_rate(folder: Path) -> float:
    config = load_config(overrides=[f"model.name={MODEL}", "model.weights=random", "model.device=cpu"])
    result = extract.run(config, input=str(folder), store=str(_new(WORK / "store")))
    assert result.extracted == result.listed
    return result.steady_images_per_second


def published(share: int) -> list[Row]:
    """(b) The extractor against the published way, at stride 8."""
    torch.set_num_threads(CORES)
    folder = photo_folder(WORK / "published", 32 // share)
    extractor = Extractor(MODEL, "random", stride=8, device="cpu")
    prepared = [extractor.prepare(path) for path in sorted(folder.iterdir())]

    def ours() -> object:
        return extractor.extract(prepared)

    seconds = {"ours": _seconds(ours)}
    for passes in (1, 2):
        seconds[f"{passes}"] = _seconds(lambda passes=passes: _published(extractor, prepared, passes))
    seconds["ours"] = (seconds["ours"] + _seconds(ours)) / 2
    figures = f"{len(prepared) / seconds['ours']:.2f} images/s; {MODEL}, stride 8"
    return [
        Row("(b) extractor / published way", seconds["2"] / seconds["ours"], ">= 1.5", figures),
        Row(
            "(b) the same, saliency from the same pass",
            seconds["1"] / seconds["ours"],
            "",
            "kinder to the published way",
        ),
    ]


def _published(extractor: Extractor, prepared: list[PreparedImage], passes: int) -> None:
    mean, std = torch.tensor(extractor.mean).view(1, 3, 1, 1), torch.tensor(extractor.std).view(1, 3, 1, 1)
    for image in prepared:
        pixels = (torch.from_numpy(image.pixels).permute(2, 0, 1)[None] / 255 - mean) / std
        published_way.descriptor_and_saliency(extractor.backbone, pixels, 11, passes)


def early_stop(share: int) -> list[Row]:
    """(c) Keys of layer 9 alone against a whole forward pass."""
    torch.set_num_threads(CORES)
    pixels = torch.randint(0, 256, (8, 224, 224, 3), dtype=torch.uint8)
    alone = Extractor(MODEL, "random", layer=9, saliency=False, embedding=False, device="cpu")
    whole = Extractor(MODEL, "random", layer=11, facet="token", device="cpu")
    ratios = []
    for _ in range(max(1, 9 // share)):
        ratios.append(_seconds(lambda: alone.forward(pixels)) / _seconds(lambda: whole.forward(pixels)))
    return [Row("(c) layer 9 keys / full forward", statistics.median(ratios), "<= 0.85", f"median of {len(ratios)}")]


def memory(share: int) -> list[Row]:
    """(d) Peak memory of the whole job, all processes, for 500 and 2,000 images."""
    peaks = {}
    for count in (500 // share, 2000 // share):
        folder, store = photo_folder(WORK / "memory", count), _new(WORK / "store")
        settings = [f"model.name={SMALL_MODEL}", "model.weights=random", "model.device=cpu"]
        options = [part for setting in settings for part in ("--set", setting)]
        dinoray = str(Path(sys.executable).with_name("dinoray"))
        peaks[count] = run_and_measure([dinoray, "extract", str(folder), str(store), *options])
    small, large = peaks.values()
    figures = ", ".join(f"{count} images {peak / 2**20:,.0f} MiB" for count, peak in peaks.items())
    return [Row("(d) peak memory, 2,000 / 500 images", large / small, "<= 1.2", f"{figures}; {SMALL_MODEL}")]


def stored_size(share: int) -> list[Row]:
    """(e) Bytes of a patches table for each value of a descriptor, keys and coordinates included."""
    folder = photo_folder(WORK / "size", 120 // share)
    rows = []
    for dtype in ("float16", "float32", "int8"):
        store = _new(WORK / "store")
        settings = [f"model.name={SMALL_MODEL}", f"model.weights={_weights()}", f"store.dtype={dtype}"]
        extract.run(load_config(overrides=settings), input=str(folder), store=str(store))
        table = DeltaTable(store / "patches")
        actions = pa.table(table.get_add_actions(flatten=True)).to_pydict()
        values = sum(actions["num_records"]) * 192
        rows.append(Row(f"(e) bytes a value, {dtype}", sum(actions["size_bytes"]) / values, "", f"{values:,} values"))
    return rows


def _weights() -> str:
    file = TEST_DATA / "weights" / "deit_tiny_patch16_224_state_dict.pth"
    return str(file) if file.exists() else "random"


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


PARTS: dict[str, Callable[[int], list[Row]]] = {
    "throughput": throughput,
    "published": published,
    "early_stop": early_stop,
    "memory": memory,
    "stored_size": stored_size,
}

if __name__ == "__main__":
    main()
