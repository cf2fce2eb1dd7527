"""estimate: what an extraction of INPUT will take, found by doing it for a sample.

The sample goes through the same stages and workers as in `extract`, into a store that is thrown away, so that bytes and
rate are measured, not modelled. Only for a device that is not here are they calculated, from its published FLOPs.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import sources, storage
from pipelines.errors import RequestError, counted
from pipelines.extract import job as extract
from pipelines.running.reports import JobResult, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.extraction import Plan
from pipelines.store.projection import exists, images_to_fit
from pipelines.store.store import Store, refuse_memory

SAMPLE = 128
SEED = 0
# From the data sheets of their makers: dense bfloat16, of T4 and V100 float16.
DEVICE_TFLOP_PER_SECOND = {
    "h200": 989.0,
    "h100": 989.0,
    "a100": 312.0,
    "l40s": 362.0,
    "rtx4090": 165.0,
    "a10g": 70.0,
    "l4": 121.0,
    "v100": 125.0,
    "t4": 65.0,
}
# timm's S/16 at 224 pixels reaches 0.46 on an RTX 4090.
VIT_SHARE_OF_DEVICE_FLOPS = 0.4
FETCHED_AND_DECODED_IMAGES_PER_CPU_SECOND = 250.0


@dataclass
class Result(JobResult):
    """What an extraction would take. Bytes and FLOPs are for `images`, those that STORE does not have yet.

    failed: images of the sample. source_bytes: of the images; None where they lie in Parquet files. bytes: by table.
    device, images_per_second: those of this machine, as measured. start_seconds: the part of `hours` for listing,
    starting workers and fitting a PCA. named_limited_by: model or decoding. cost_per_million: for a million images,
    once workers run, on the named device, or else on the one that is here.
    """

    listed: int = 0
    images: int = 0
    sample: int = 0
    failed: int = 0
    source_bytes: int | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    bytes_per_image: float = 0.0
    patches: int = 0
    gflop_per_image: float = 0.0
    tflop: float = 0.0
    device: str = ""
    images_per_second: float = 0.0
    start_seconds: float = 0.0
    hours: float = 0.0
    named_device: str | None = None
    named_images_per_second: float | None = None
    named_limited_by: str | None = None
    named_hours: float | None = None
    price_per_hour: float | None = None
    cost_per_million: float | None = None
    cost: float | None = None


def run(
    config: Config,
    *,
    input: str,
    store: str,
    sample: int = SAMPLE,
    device: str | None = None,
    cpus: int = 16,
    price: float | None = None,
) -> Result:
    """Extract a sample of the images of INPUT that STORE does not have, and estimate what all of them take.

    Args:
        device: also estimate for one of this kind, a key of DEVICE_TFLOP_PER_SECOND, with `cpus` CPUs for decoding.
        price: of an hour of the device, in any currency.

    Raises:
        RequestError, sources.InputError, dino_ops.errors.ModelError: the request was wrong.
        JobError: the sample could not be extracted.
    """
    started = time.monotonic()
    if device is not None and device not in DEVICE_TFLOP_PER_SECOND:
        raise RequestError(f"There is no device {device!r}: choose one of {', '.join(DEVICE_TFLOP_PER_SECOND)}.")
    refuse_memory(input, "INPUT")
    result = Result(new_run_id(), storage.normalise(store))
    with recorded(None, result, started):
        listing = sources.list_images(input, storage_options=config.storage.options, exclude=result.store).table
        result.seconds["list"] = time.monotonic() - started
        opened = Store.open_existing(result.store, config)
        pending = (opened.plan(listing) if opened else Plan.of_empty_store(listing)).pending
        result.listed, result.images = len(listing), len(pending)
        if len(pending):
            fitted = opened is not None and exists(opened.uri, config)
            _estimate(config, pending, sample, result, fitted=fitted)
            if device is not None:
                _estimate_on(device, cpus, result)
            _price(price, result)
        else:
            result.messages.append("STORE has all images of INPUT: there is nothing to extract.")
    return result


def _estimate(config: Config, pending: pa.Table, sample: int, result: Result, *, fitted: bool) -> None:
    """What the device that is here takes. fitted: STORE has its PCA already."""
    chosen = np.random.default_rng(SEED).permutation(len(pending))[: min(sample, len(pending))]
    _measure(config, pending.take(pa.array(np.sort(chosen))), result, fitted=fitted)
    result.start_seconds = round(result.start_seconds + result.seconds["list"], 2)
    if result.images_per_second:
        result.hours = (result.start_seconds + result.images / result.images_per_second) / 3600
    result.source_bytes = _source_bytes(pending)


def _price(price: float | None, result: Result) -> None:
    here, named = (result.hours, result.images_per_second), (result.named_hours, result.named_images_per_second)
    hours, rate = here if result.named_device is None else named
    if price is not None and hours and rate:
        result.price_per_hour, result.cost = price, round(price * hours, 2)
        result.cost_per_million = round(price * 1e6 / rate / 3600, 2)


def _measure(config: Config, rows: pa.Table, result: Result, *, fitted: bool) -> None:
    """Extract the sample, and scale its bytes, FLOPs and rate to all images. fitted: STORE has its PCA already."""
    from pipelines.extract.layout import model_facts

    began = time.monotonic()
    facts = model_facts(config)
    plan = Plan.of_empty_store(rows.drop_columns(["position"]))
    done = extract.Result(run_id="sample", store=result.store)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Store.create(storage.join(folder, "store"), config)
        extract.extract_pending(scratch, plan, config, done, facts, "estimate")
        taken = time.monotonic() - began
        scratch.refresh()
        sizes = {name: sum(file.size for file in table.files().values()) for name, table in _tables(scratch)}
        patches = sum(file.rows for file in scratch.patches.files().values())
        grids = scratch.images.read(["grid_height", "grid_width"])
    result.sample, result.failed = len(rows), done.failed
    if not done.extracted:
        reasons = ", ".join(done.failures_by_reason)
        raise RequestError(
            f"None of {counted(len(rows), 'sampled image')} could be extracted ({reasons}): check INPUT."
        )
    share = result.images / len(rows)
    result.bytes = {name: round(size * share) for name, size in sizes.items()}
    result.bytes_per_image = round(sum(result.bytes.values()) / result.images, 1)
    result.patches = round(patches * share)
    cells = grids["grid_height"].to_numpy().astype(float) * grids["grid_width"].to_numpy()
    result.gflop_per_image = round(float(np.mean([facts.gflop_of(patches) for patches in cells])), 3)
    result.tflop = round(result.gflop_per_image * result.images * done.extracted / len(rows) / 1e3, 3)
    result.device = done.device
    rate = done.steady_images_per_second or done.images_per_second
    result.images_per_second = round(rate, 2)
    if rate:
        passed_here = len(rows) + images_to_fit(config, len(rows))
        to_fit = 0 if fitted else images_to_fit(config, result.images)
        result.start_seconds = max(0.0, taken - passed_here / rate) + to_fit / rate
    if len(rows) < 32:
        measured = f"{counted(len(rows), 'image')} {'was' if len(rows) == 1 else 'were'} measured"
        result.messages.append(f"Only {measured}, so the rate is a guess: raise --sample.")


def _tables(store: Store) -> list[tuple[str, Any]]:
    return [("images", store.images), ("patches", store.patches)]


def _source_bytes(pending: pa.Table) -> int | None:
    # of images in Parquet files the listing knows only the files' sizes
    if pending["row_group"].null_count < len(pending):
        return None
    return int(np.maximum(pending["source_size"].to_numpy(), 0).sum())


def _estimate_on(device: str, cpus: int, result: Result) -> None:
    """The rate and hours on a device that is not here."""
    by_model = VIT_SHARE_OF_DEVICE_FLOPS * DEVICE_TFLOP_PER_SECOND[device] * 1e3 / result.gflop_per_image
    by_decoding = FETCHED_AND_DECODED_IMAGES_PER_CPU_SECOND * cpus
    result.named_device = device
    result.named_images_per_second = round(min(by_model, by_decoding), 1)
    result.named_limited_by = "model" if by_model <= by_decoding else "decoding"
    result.named_hours = result.images / result.named_images_per_second / 3600
