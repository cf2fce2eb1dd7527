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
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.sections import Config

FOLDS = 5


@dataclass
class Result(JobResult):
    """Top-1 accuracy.

    task: knn or linear. accuracy: fraction of the tested images whose label was found, by k for knn, under "linear"
    otherwise. chance: fraction that the commonest label alone would find. unlabelled: images left out. unknown: tested
    images whose label no image to learn from has; they count as wrong. rates: for linear, the learning rates that were
    chosen.
    """

    task: str
    test: str | None
    learnt_from: int = 0
    tested: int = 0
    labels: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    chance: float = 0.0
    unlabelled: int = 0
    unknown: int = 0
    rates: list[float] = field(default_factory=list)


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
    truth = (tested or learnt).labels
    result = Result(new_run_id(), opened.uri, task, other.uri if other is not None else None)
    result.learnt_from, result.tested, result.labels = len(learnt.labels), len(truth), len(learnt.names)
    result.unlabelled = learnt.unlabelled + (tested.unlabelled if tested else 0)
    result.unknown = tested.unknown if tested else 0
    result.chance = round(float((truth == np.bincount(learnt.labels).argmax()).mean()), 6)
    report = RunReport(f"evaluate {task}", opened.uri, config, result.run_id, {"test": test}, optional=True)
    with recorded(report, result, started):
        if task == "knn":
            predictions = _knn(learnt, tested, config)
        else:
            predictions, result.rates = _linear(learnt, tested, config)
        result.accuracy = {what: round(float((found == truth).mean()), 6) for what, found in predictions.items()}
    return result


def knn(config: Config, *, store: str, test: str | None = None) -> Result:
    """k-NN accuracy of the embeddings of a store; see `run`."""
    return run(config, task="knn", store=store, test=test)


def linear(config: Config, *, store: str, test: str | None = None) -> Result:
    """Linear-probe accuracy of the embeddings of a store; see `run`."""
    return run(config, task="linear", store=store, test=test)


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
