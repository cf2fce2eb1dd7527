"""Training as a user runs it against the bare networks: what reading, augmenting, moving and logging cost.

make bench        (this part: about four minutes on two cores)
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.photos import photo_folder
from benchmarks.results import Row, report
from dino_ops.devices import autocast_dtype, resolve_precision
from dino_ops.models import create_model
from dino_ops.multicrop import GLOBAL_CROPS
from dino_ops.recipe import Recipe
from dino_ops.self_distillation import Network
from pipelines.running.cpus import available_cpus
from pipelines.settings.loading import load_config
from pipelines.train.setup import make_recipe

WORK = Path(__file__).with_name("work") / "train"
MODEL = "vit_tiny_patch16_224"
IMAGES, BARE_STEPS, WARM_UP = 240, 4, 3
ON_GPU = torch.cuda.is_available()
SETTINGS = {
    "as published (224 and 96 pixels)": ["train.batch_size=128" if ON_GPU else "train.batch_size=16"],
    "small_data at 96 and 48 pixels": [
        "train.preset=small_data",
        "train.global_size=96",
        "train.local_size=48",
        "train.batch_size=256" if ON_GPU else "train.batch_size=32",
    ],
}


def main() -> None:
    photo_folder(WORK / "photos", IMAGES)
    report(f"train, {MODEL}", [_row(name, settings) for name, settings in SETTINGS.items()])


def _row(name: str, settings: list[str]) -> Row:
    """Images a second of the command, and of the same networks on crops that are there already, before and after."""
    recipe = make_recipe(load_config(overrides=settings).train)
    before = _bare(recipe)
    trained = _command(settings)
    after = _bare(recipe)
    bare = (before + after) / 2
    least = ">= 0.9" if ON_GPU else ">= 0.8"
    return Row(
        f"train / bare, {name}", trained / bare, least, f"{trained:.2f} images/s; bare {before:.2f}, {after:.2f}"
    )


def _command(settings: list[str]) -> float:
    output = WORK / "output"
    shutil.rmtree(output, ignore_errors=True)
    asked = [f"model.name={MODEL}", "train.epochs=1", "train.warmup_epochs=0", "train.evaluate_epochs=0", *settings]
    options = [part for one in [*asked, "train.log_steps=1"] for part in ("--set", one)]
    command = [str(Path(sys.executable).with_name("dinoray")), "train", str(WORK / "photos"), str(output), *options]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for file in sorted((output / "log").glob("*.jsonl")) for line in file.open()]
    return statistics.median(line["images_per_second"] for line in lines[WARM_UP:])


def _bare(recipe: Recipe) -> float:
    """Teacher forward, student forward and backward on ready tensors: no optimiser, no average, no images."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    torch.set_num_threads(available_cpus())
    student, teacher = (Network(create_model(MODEL, "random"), recipe).to(device).train() for _ in range(2))
    student.backbone.requires_grad_(True)
    crops, batch = recipe.multicrop, recipe.batch_size
    whole = torch.randn(GLOBAL_CROPS * batch, 3, crops.global_size, crops.global_size, device=device)
    local = torch.randn(crops.local_crops * batch, 3, crops.local_size, crops.local_size, device=device)
    dtype = autocast_dtype(resolve_precision("auto", device))
    seconds = []
    for _ in range(BARE_STEPS + 1):
        began = time.monotonic()
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            with torch.no_grad():
                wanted = F.softmax(teacher([whole])[0].float() / 0.04, dim=-1).unflatten(0, (GLOBAL_CROPS, batch))
            logits, _ = student([whole, local])
        said = F.log_softmax(logits.float() / 0.1, dim=-1).unflatten(0, (-1, batch))
        (-torch.einsum("gbk,cbk->", wanted, said) / batch).backward()
        if ON_GPU:
            torch.cuda.synchronize()
        student.zero_grad()
        seconds.append(time.monotonic() - began)
    return batch / float(np.median(seconds[1:]))


if __name__ == "__main__":
    main()
