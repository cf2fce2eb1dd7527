"""What a training's workers report to the command that started it, and its request to them to stop.

And what a curve means: a collapse, in words.
"""

from __future__ import annotations

import math
from typing import Any

# A value this near to an end of 0..ln(out_dim) counts as pinned to it.
PINNED_SHARE_OF_LN_OUT_DIM = 0.02
# Earlier, entropies are near their ends anyway.
WATCHED_FROM_SHARE_OF_STEPS = 0.1
WATCHED_FROM_STEPS_AT_LEAST = 200


class Monitor:
    """A Ray actor between the workers and the driver. bad: unreadable images that are known from before."""

    def __init__(self, bad: list[dict[str, Any]]) -> None:
        self._records: list[dict[str, Any]] = []
        self._bad = {one["image_id"]: one for one in bad}
        self._stop = False
        self._outcome: dict[str, Any] | None = None
        self._started: dict[str, Any] = {}

    def start(self, **facts: Any) -> None:
        """The workers are ready. facts: resumed_from, device."""
        self._started = facts

    def report(self, records: list[dict[str, Any]], bad: list[dict[str, Any]]) -> bool:
        """Take records of the log and unreadable images; whether the training is to stop."""
        self._records += records
        for one in bad:
            self._bad.setdefault(one["image_id"], one)
        return self._stop

    def end(self, **outcome: Any) -> None:
        self._outcome = outcome

    def stop(self) -> None:
        self._stop = True

    def news(self, known: int) -> dict[str, Any]:
        """What there is besides the first `known` records."""
        return {
            "started": self._started,
            "records": self._records[known:],
            "bad": len(self._bad),
            "outcome": self._outcome,
        }

    def bad_images(self) -> list[dict[str, Any]]:
        return sorted(self._bad.values(), key=lambda one: one["image_id"])


class CollapseWatch:
    """Looks at a training's curve and says once, in a sentence, what looks like a collapse.

    A collapsed network says the same of every image: the teacher's assignments are all one prototype, or all alike,
    and then the loss is stuck at ln(out_dim) (facebookresearch/dino, issue 43; dinov2, issue 407).
    """

    def __init__(self, out_dim: int, steps: int) -> None:
        self._most = math.log(out_dim)
        self._from_step = max(WATCHED_FROM_SHARE_OF_STEPS * steps, min(WATCHED_FROM_STEPS_AT_LEAST, steps))
        self._said: set[str] = set()

    def look(self, record: dict[str, Any]) -> list[str]:
        """Sentences about a record of the log that were not said before."""
        if "loss" not in record or record["step"] < self._from_step:
            return []
        found = []
        entropy, loss = record["teacher_entropy"], record["loss"]
        if (
            abs(loss - self._most) < PINNED_SHARE_OF_LN_OUT_DIM * self._most
            and entropy > (1 - PINNED_SHARE_OF_LN_OUT_DIM) * self._most
        ):
            found.append(
                (
                    "even",
                    f"The loss is stuck at {loss:.3f}, ln(out_dim) being {self._most:.3f}: the teacher has no "
                    "opinion of any image, a collapse. Lower train.teacher_temperature (0.04), or take "
                    "train.centring=sinkhorn.",
                )
            )
        elif entropy < PINNED_SHARE_OF_LN_OUT_DIM * self._most:
            found.append(
                (
                    "one",
                    f"The teacher's entropy has fallen to {entropy:.3f} nats: it puts all images into few prototypes, "
                    "a collapse. Raise train.teacher_temperature, lower train.learning_rate, or take "
                    "train.centring=sinkhorn.",
                )
            )
        elif record["divergence"] < 1e-3:
            found.append(
                (
                    "nothing",
                    f"The student already says what the teacher says (divergence {record['divergence']:.4f} nats): "
                    "nothing more is being learnt. Lower train.learning_rate, or train.momentum of the teacher.",
                )
            )
        return [self._once(kind, sentence) for kind, sentence in found if kind not in self._said]

    def _once(self, kind: str, sentence: str) -> str:
        self._said.add(kind)
        return sentence
