"""What importing loads: decoding workers and `--help` must not pay for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dino_ops


@pytest.mark.parametrize(
    "statement",
    ["import dino_ops", "from dino_ops.images import prepare_image", "from dino_ops import ImageSpec, PCA, ImageError"],
)
def test_loads_no_torch(statement: str) -> None:
    script = (
        f"import sys; {statement}; assert not {{'torch', 'timm', 'ray', 'pyarrow', 'pipelines'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_public_names() -> None:
    for name in dino_ops.__all__:
        assert getattr(dino_ops, name).__name__ == name
    assert set(dino_ops.__all__) <= set(dir(dino_ops))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dino_ops.nonsense
