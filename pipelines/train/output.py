"""What a training leaves for others: backbone.safetensors, which `extract` loads, and README.md, the model card."""

from __future__ import annotations

import safetensors.torch
import torch

from pipelines import storage
from pipelines.train.setup import TrainSetup

FORMAT = "pt"  # what readers of safetensors look for


def weights_uri(output: str) -> str:
    return storage.join(output, "backbone.safetensors")


def card_uri(output: str) -> str:
    return storage.join(output, "README.md")


def write_weights(training: TrainSetup, state: dict[str, torch.Tensor]) -> None:
    """Write the teacher's backbone whole, in float32; its header says which model it is."""
    about = {"format": FORMAT, "model": training.config.model.name, "dinoray_run": training.run_id}
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}, about)
    storage.write_bytes(weights_uri(training.output), content, training.config.storage.options)
