"""The model card: what was trained, on what, how, and how it went, in Markdown that people and hubs read."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import Any

from pipelines import storage
from pipelines.errors import counted
from pipelines.storage.secrets import hidden
from pipelines.train.output import card_uri, extract_command
from pipelines.train.setup import TrainSetup

ROWS_OF_CURVE = 20


def write_card(training: TrainSetup, records: list[dict[str, Any]], result: Any) -> None:
    """Write README.md of OUTPUT. records: of the log."""
    content = make_card(training, records, result)
    storage.write_bytes(card_uri(training.output), content.encode(), training.config.storage.options)


def make_card(training: TrainSetup, records: list[dict[str, Any]], result: Any) -> str:
    """The card, without the credentials of the URIs that it names."""
    name, recipe = training.config.model.name, training.recipe
    start = "random weights" if training.weights == "random" else f"`{training.weights}`"
    settings = dataclasses.asdict(recipe)
    settings |= settings.pop("multicrop")
    accuracies = [record for record in records if "knn_accuracy" in record]
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, self-supervised, dino]",
        "---",
        "",
        f"# {name}, self-distilled",
        "",
        f"The backbone of `{name}`, trained without labels by self-distillation (DINO, Caron et al. 2021) with "
        f"dinoray {metadata.version('dinoray')}.",
        "",
        f"    {extract_command(training)}",
        "",
        "## Data",
        "",
        f"{counted(training.images, 'image')} of `{result.input}` (digest {training.images_digest}), "
        f"{result.unreadable:,} of which could not be read and were replaced by others. Labels were not used for "
        "training.",
        "",
        "## Recipe",
        "",
        f"From {start}, {counted(recipe.epochs, 'epoch')} of {counted(training.steps_per_epoch, 'step')} on "
        f"{counted(result.workers, 'GPU worker' if result.device == 'cuda' else 'CPU worker')}.",
        "",
        "| setting | value |",
        "|---|---|",
        *[f"| train.{key} | {_plain(value)} |" for key, value in settings.items()],
        "",
        "## Curve",
        "",
        "| epoch | loss | teacher's entropy (nats) | k-NN accuracy |",
        "|---|---|---|---|",
        *_curve(records),
        "",
    ]
    if accuracies:
        where = (
            f"the images of `{training.config.train.validation}`"
            if training.config.train.validation
            else "images of INPUT itself, each by all others"
        )
        lines += [
            f"k-NN accuracy: 20 neighbours, temperature 0.07, {recipe.multicrop.global_size} pixels, on {where}; "
            f"{accuracies[0]['knn_accuracy']:.1%} at the beginning, {accuracies[-1]['knn_accuracy']:.1%} at the end.",
            "",
        ]
    return hidden("\n".join(lines))


def _curve(records: list[dict[str, Any]]) -> list[str]:
    """Some lines of the log, and all accuracies beside the loss that came before."""
    losses = [record for record in records if "loss" in record]
    accuracies = {record["step"]: record["knn_accuracy"] for record in records if "knn_accuracy" in record}
    every = max(1, len(losses) // ROWS_OF_CURVE)
    shown = {record["step"]: record for record in losses[::-1][::every]} | {
        record["step"]: record for record in losses if record["step"] in accuracies
    }
    rows = []
    if 0 in accuracies:
        rows.append(f"| 0 | | | {accuracies[0]:.1%} |")
    for step, record in sorted(shown.items()):
        accuracy = f"{accuracies[step]:.1%}" if step in accuracies else ""
        rows.append(f"| {record['epoch']:.2f} | {record['loss']:.3f} | {record['teacher_entropy']:.3f} | {accuracy} |")
    return rows


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
