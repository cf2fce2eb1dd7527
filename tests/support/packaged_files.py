"""The weights that the package carries, and files to stand in for them in tests of everything but their values."""

from __future__ import annotations

from pathlib import Path

from dino_ops import packaged

WEIGHTS = packaged.FOLDER / "dinoray_tiny.safetensors"
CARD = packaged.FOLDER / "dinoray_tiny.md"


def stand_in(folder: Path, seed: int) -> Path:
    """A file like the packaged one, with seeded random weights: half precision, timm's names."""
    from safetensors.torch import save_file

    from dino_ops.models import create_model

    folder.mkdir(parents=True, exist_ok=True)
    state = create_model("deit_tiny_patch16_224", "random", seed=seed).vit.state_dict()
    path = folder / WEIGHTS.name
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, path)
    return path
