"""Small real weights that this package carries, so that every command works on a machine without a model hub.

Their cards (data, recipe, accuracy, what they are good for) lie beside them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from dino_ops.errors import ModelError

PACKAGED = ("dinoray_tiny",)
FOLDER = Path(str(resources.files("dino_ops"))) / "pretrained"


def packaged_weights(name: str) -> Path:
    """Path of the weights of a model in PACKAGED, a .safetensors file in half precision under timm's names.

    Raises ModelError where the installation lacks it.
    """
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise ModelError(
            f"this installation of dinoray lacks the weights of {name} ({path}): install it again, or give "
            "model.weights=/path/to/file"
        )
    return path
