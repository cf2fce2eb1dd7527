"""Numbers in sentences."""

import pytest

from pipelines.errors import counted


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1_000, "1,000 images"), (1_234_567, "1,234,567 images")],
)
def test_one_is_singular_and_thousands_are_separated(count: int, said: str) -> None:
    assert counted(count, "image") == said
