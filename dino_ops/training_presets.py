"""What presets of a self-distillation change of the published settings, and why."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    # Few images: 65,536 prototypes would mostly stay empty, and few steps need a teacher that follows faster. Balanced
    # assignments and KoLeo keep a small set from collapsing without a long warm-up of the temperature.
    "small_data": {
        "out_dim": 2048,
        "hidden_dim": 1024,
        "centring": "sinkhorn",
        "koleo": 0.1,
        "momentum": 0.99,
        "warmup_teacher_temperature": 0.04,
        "teacher_temperature": 0.04,
        "freeze_prototypes_epochs": 0,
        "learning_rate": 2e-3,
        "local_crops": 6,
    },
    # Few images a step: the published code recommends a slower teacher; the centre, a mean over so few, moves slower
    # too, and the balance of a small batch says little, so it stays with the running mean.
    "small_batches": {
        "momentum": 0.9995,
        "centre_momentum": 0.99,
        "out_dim": 4096,
    },
}
