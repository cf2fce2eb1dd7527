"""Compact descriptors: cosines against those of float64, and the exactness that another language relies on."""

from __future__ import annotations

import numpy as np
import pytest

from dino_ops.compact_descriptors import REGION_QUERY_STEPS, compact_descriptors, cosines, region_query


def rows(count: int = 400, channels: int = 48, rank: int = 12, seed: int = 0) -> np.ndarray:
    """Descriptors that lie near a subspace, far from the origin, of very different lengths."""
    generator = np.random.default_rng(seed)
    low = generator.standard_normal((count, rank)) @ generator.standard_normal((rank, channels))
    noise = 0.05 * generator.standard_normal((count, channels))
    return (low + 2.0 + noise) * generator.uniform(0.01, 100, (count, 1))


def exact(all_rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    return all_rows @ query / np.linalg.norm(all_rows, axis=1) / np.linalg.norm(query)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_cosines_are_nearly_those_of_the_descriptors(dtype: type) -> None:
    given = rows().astype(dtype)
    compact = compact_descriptors(given, 16)
    assert compact.codes.dtype == np.int8 and compact.codes.shape == (400, 16) and compact.kept > 0.99
    wide = given.astype(np.float64)
    for at in (0, 17, 399):
        found, right = cosines(compact.codes, region_query(compact.codes[[at]])), exact(wide, wide[at])
        np.testing.assert_allclose(found, right, atol=0.02)
        assert found.argmax() == at and np.argsort(found)[-2] == np.argsort(right)[-2]


def test_a_mean_is_not_taken_away() -> None:
    """Descriptors that share a large part resemble each other, and their codes say so too."""
    given = np.random.default_rng(0).standard_normal((200, 32)) + 10
    compact = compact_descriptors(given, 8)
    assert cosines(compact.codes, region_query(compact.codes[[0]])).min() > 0.9


def test_a_region_is_the_mean_of_directions() -> None:
    given = rows()
    compact = compact_descriptors(given, 16)
    query = region_query(compact.codes[10:14])
    assert np.abs(query).max() == REGION_QUERY_STEPS
    unit = compact.codes[10:14] / np.linalg.norm(compact.codes[10:14].astype(float), axis=1, keepdims=True)
    np.testing.assert_allclose(
        cosines(compact.codes, query), exact(compact.codes.astype(float), unit.sum(axis=0)), atol=1e-4
    )


def test_sums_fit_into_32_bits() -> None:
    codes = np.full((2, 512), 127, np.int8)
    query = region_query(codes)
    assert int(codes[0].astype(np.int64) @ query.astype(np.int64)) < 2**31
    np.testing.assert_allclose(cosines(codes, query), 1, rtol=1e-12)


def test_fewer_channels_than_dimensions_zeros_and_nothing() -> None:
    given = rows(channels=6)
    given[3] = 0
    compact = compact_descriptors(given, 64)
    assert compact.codes.shape == (400, 6) and compact.kept == pytest.approx(1)
    assert not compact.codes[3].any() and cosines(compact.codes, region_query(compact.codes[[0]]))[3] == 0
    assert compact_descriptors(np.zeros((0, 6)), 4).codes.shape == (0, 4)
    assert not compact_descriptors(np.zeros((3, 6)), 4).codes.any()


def test_a_sample_fits_as_well() -> None:
    given = rows(count=2000)
    sampled, whole = (compact_descriptors(given, 16, max_rows=most) for most in (300, 10_000))
    queries = [region_query(one.codes[[5]]) for one in (sampled, whole)]
    np.testing.assert_allclose(cosines(sampled.codes, queries[0]), cosines(whole.codes, queries[1]), atol=0.03)


def test_wrong_requests() -> None:
    for dimensions in (0, 513):
        with pytest.raises(ValueError, match="there can be 1 to 512"):
            compact_descriptors(rows(), dimensions)
    with pytest.raises(ValueError, match="at least one patch"):
        region_query(np.zeros((0, 4), np.int8))
