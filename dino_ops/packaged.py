"""Small real weights that this package carries, so that every command works on a machine without a model hub.

Their cards (data, recipe, accuracy, what they are good for) lie beside them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from dino_ops.errors import ModelError

PACKAGED = ("dinoray_tiny",)
FOLDER = Path(str(resources.files("dino_ops"))) / "pretrained"


def has_weights(name: str) -> bool:
    """Whether this version carries the weights of a model in PACKAGED."""
    return (FOLDER / f"{name}.safetensors").is_file()


def packaged_weights(name: str) -> Path:
    """Path of the weights of a model in PACKAGED, a .safetensors file in half precision under timm's names.

    Raises ModelError where the installation lacks it.
    """
    if not has_weights(name):
        raise ModelError(
            f"this version of dinoray does not carry the weights of {name}, which are to come with a later one: give "
            "model.weights=/path/to/file"
        )
    return FOLDER / f"{name}.safetensors"
