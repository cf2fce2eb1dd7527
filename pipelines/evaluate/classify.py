"""evaluate knn and linear: how well embeddings tell labels apart, from the images tables of stores.

With a store to be tested on, every image of it is classified by what the other store's images say. Without one, every
image is classified by the others: by all of them (knn), or by four fifths in turn (linear).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dino_ops.linear_probe import fit_linear_probe
from dino_ops.nearest_classes import classify_by_neighbours
from pipelines.errors import RequestError
from pipelines.evaluate.labelled import Labelled, open_pair, read_labelled
from pipelines.evaluate.reports import write_report
from pipelines.running.reports import RunReport, new_run_id
from pipelines.settings.sections import Config

FOLDS = 5


@dataclass
class Result:
    """Top-1 accuracy.

    task: knn or linear. accuracy: fraction of the tested images whose label was found, by k for knn, under "linear"
    otherwise. chance: fraction that the commonest label alone would find. unlabelled: images left out. unknown: tested
    images whose label no image to learn from has; they count as wrong. rates: for linear, the learning rates that were
    chosen.
    """

    run_id: str
    task: str
    store: str
    test: str | None
    learnt_from: int
    tested: int
    labels: int
    accuracy: dict[str, float]
    chance: float
    unlabelled: int
    unknown: int = 0
    rates: list[float] = field(default_factory=list)
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__


def run(config: Config, *, task: str, store: str, test: str | None = None) -> Result:
    """Classify images by their embeddings; settings: evaluate.neighbours, temperature, epochs, seed.

    Args:
        task: knn or linear.
        test: a store of the same spec to be tested on.

    Raises RequestError without labels, with one label only, without embeddings, and for stores that do not compare.
    """
    started = time.monotonic()
    opened, other = open_pair(store, test, config)
    learnt = read_labelled(opened)
    if len(learnt.names) < 2:
        raise RequestError(
            f"All labelled images of {opened.uri} have the same label ({learnt.names[0]}): there is nothing to tell "
            "apart."
        )
    tested = read_labelled(other, learnt.names) if other is not None else None
    report = RunReport(f"evaluate {task}", opened.uri, config, new_run_id(), {"test": test})
    rates: list[float] = []
    if task == "knn":
        predictions = _knn(learnt, tested, config)
    else:
        predictions, rates = _linear(learnt, tested, config)
    truth = (tested or learnt).labels
    result = Result(
        run_id=report.content["run_id"],
        task=task,
        store=opened.uri,
        test=other.uri if other is not None else None,
        learnt_from=len(learnt.labels),
        tested=len(truth),
        labels=len(learnt.names),
        accuracy={what: round(float((found == truth).mean()), 6) for what, found in predictions.items()},
        chance=round(float((truth == np.bincount(learnt.labels).argmax()).mean()), 6),
        unlabelled=learnt.unlabelled + (tested.unlabelled if tested else 0),
        unknown=tested.unknown if tested else 0,
        rates=rates,
        seconds=round(time.monotonic() - started, 2),
    )
    result.messages += write_report(report, result.as_dict())
    return result


def _knn(learnt: Labelled, tested: Labelled | None, config: Config) -> dict[str, np.ndarray]:
    queries = None if tested is None else tested.embeddings
    asked = config.evaluate
    found = classify_by_neighbours(
        learnt.embeddings, learnt.labels, queries, asked.neighbours, temperature=asked.temperature
    )
    return {str(k): labels for k, labels in found.items()}


def _linear(learnt: Labelled, tested: Labelled | None, config: Config) -> tuple[dict[str, np.ndarray], list[float]]:
    """Predictions, and the learning rates that were chosen."""
    asked = config.evaluate

    def fit(rows: np.ndarray | slice) -> Any:
        return fit_linear_probe(
            learnt.embeddings[rows],
            learnt.labels[rows],
            classes=len(learnt.names),
            epochs=asked.epochs,
            seed=asked.seed,
        )

    if tested is not None:
        probe = fit(slice(None))
        return {"linear": probe.predict(tested.embeddings)}, [probe.rate]
    order = np.random.default_rng(asked.seed).permutation(len(learnt.labels))
    predictions, rates = np.full(len(order), -2, np.int64), []
    for fold in np.array_split(order, min(FOLDS, len(order))):
        probe = fit(np.setdiff1d(order, fold))
        predictions[fold] = probe.predict(learnt.embeddings[fold])
        rates.append(probe.rate)
    return {"linear": predictions}, rates
