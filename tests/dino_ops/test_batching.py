"""Batch sizes, with a device that pretends to have little memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dino_ops.batching import MAX_CUDA_BATCH_TOKENS, BatchSizer


class OutOfMemory(Exception):
    pass


class SmallDevice:
    """Computes batches of up to `capacity` tokens."""

    def __init__(self, capacity: int, tokens: int) -> None:
        self.capacity, self.tokens = capacity, tokens
        self.sizes: list[int] = []

    def compute(self, items: Sequence[int]) -> list[int]:
        self.sizes.append(len(items))
        if len(items) * self.tokens > self.capacity:
            raise OutOfMemory
        return [item * 10 for item in items]


def run_all(sizer: BatchSizer, device: SmallDevice, items: list[int]) -> list[int]:
    results: list[int] = []
    while items:
        size = sizer.images(device.tokens)
        for part in sizer.run(items[:size], device.tokens, device.compute):
            results += part
        items = items[size:]
    return results


def test_halves_until_it_fits_and_remembers() -> None:
    sizer, device = BatchSizer("auto", "cuda", OutOfMemory), SmallDevice(capacity=9_000, tokens=200)
    assert run_all(sizer, device, list(range(1000))) == [i * 10 for i in range(1000)]
    failures = [size for size in device.sizes if size * 200 > 9_000]
    assert len(failures) == 1  # 81 images; 40 fit, and it never tried more again
    assert max(device.sizes[2:]) <= 45


def test_grows_while_memory_lasts() -> None:
    sizer, device = BatchSizer("auto", "cuda", OutOfMemory), SmallDevice(capacity=10**9, tokens=200)
    run_all(sizer, device, list(range(5000)))
    assert device.sizes[:4] == [81, 163, 327, 655]
    assert max(device.sizes) == MAX_CUDA_BATCH_TOKENS // 200


def test_failing_after_growth_goes_back() -> None:
    sizer, device = BatchSizer("auto", "cuda", OutOfMemory), SmallDevice(capacity=40_000, tokens=200)
    assert len(run_all(sizer, device, list(range(3000)))) == 3000
    assert sum(size > 200 for size in device.sizes) == 1


def test_small_batches_do_not_make_it_grow() -> None:
    sizer, device = BatchSizer("auto", "cuda", OutOfMemory), SmallDevice(capacity=10**9, tokens=200)
    for _ in range(20):
        run_all(sizer, device, [1, 2, 3])
    assert sizer.images(200) == 81


def test_a_number_is_kept_unless_memory_runs_out() -> None:
    sizer, device = BatchSizer(64, "cuda", OutOfMemory), SmallDevice(capacity=5_000, tokens=200)
    assert sizer.images(200) == sizer.images(100_000) == 64
    assert run_all(sizer, device, list(range(300))) == [i * 10 for i in range(300)]
    assert device.sizes[0] == 64 and max(device.sizes[3:]) <= 32


def test_what_one_shape_taught_holds_for_another() -> None:
    sizer = BatchSizer("auto", "cuda", OutOfMemory)
    run_all(sizer, SmallDevice(capacity=9_000, tokens=200), list(range(100)))
    assert sizer.images(1000) * 1000 <= 9_000
    assert sizer.images(10**6) == 1


def test_one_image_too_large_is_an_error() -> None:
    sizer, device = BatchSizer("auto", "cuda", OutOfMemory), SmallDevice(capacity=100, tokens=200)
    with pytest.raises(OutOfMemory):
        run_all(sizer, device, [1, 2])


def test_cpu_takes_a_few_images_and_large_ones_alone() -> None:
    sizer = BatchSizer("auto", "cpu")
    assert [sizer.images(tokens) for tokens in (197, 3137, 200_000)] == [8, 5, 1]
