"""What a training leaves for others: backbone.safetensors, which `extract` loads, README.md, the model card, and
unreadable.jsonl, the images that could not be used."""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
import torch

from pipelines import storage
from pipelines.train.setup import TrainSetup

# Readers of safetensors look for this.
FORMAT = "pt"


def weights_uri(output: str) -> str:
    return storage.join(output, "backbone.safetensors")


def card_uri(output: str) -> str:
    return storage.join(output, "README.md")


def extract_command(training: TrainSetup) -> str:
    """The command that extracts features as the network was trained: its model, weights and normalisation of pixels."""
    model, image = training.config.model.name, training.config.image
    settings = [f"model.name={model}", f"model.weights={weights_uri(training.output)}"]
    for name, values in (("mean", image.mean), ("std", image.std)):
        settings += [f"image.{name}=[{','.join(map(str, values))}]"] if values is not None else []
    return " ".join(["dinoray extract INPUT STORE", *(f"--set {one}" for one in settings)])


def write_weights(training: TrainSetup, state: dict[str, torch.Tensor]) -> None:
    """Write the teacher's backbone whole, in train.weights_dtype; its header says which model it is."""
    about = {"format": FORMAT, "model": training.config.model.name, "dinoray_run": training.run_id}
    dtype = torch.float16 if training.config.train.weights_dtype == "float16" else torch.float32
    content = safetensors.torch.save({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, about)
    storage.write_bytes(weights_uri(training.output), content, training.config.storage.options)


def unreadable_uri(output: str) -> str:
    return storage.join(output, "unreadable.jsonl")


def write_unreadable(output: str, images: list[dict[str, Any]], options: storage.Options) -> None:
    """Write unreadable.jsonl, one image a line, if there are any."""
    if images:
        content = "".join(f"{json.dumps(one)}\n" for one in images)
        storage.write_bytes(unreadable_uri(output), content.encode(), options)


def read_unreadable(output: str, options: storage.Options) -> list[dict[str, Any]]:
    fs, path = storage.filesystem(unreadable_uri(output), options)
    try:
        with storage.reaching(output):
            return [json.loads(line) for line in fs.cat_file(path).decode().splitlines()]
    except FileNotFoundError:
        return []
