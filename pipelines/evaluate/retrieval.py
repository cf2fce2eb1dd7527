"""evaluate retrieval: do the nearest images have the same label? Recall@k and mAP from the embeddings of a store."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pyarrow.compute as pc

from dino_ops.metrics import retrieval_by_label
from pipelines.errors import RequestError
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.store import Store

VECTOR_COLUMNS_OF_IMAGES = ("embeddings",)


@dataclass
class Result(JobResult):
    """Retrieval by label: every image asks for others of its label, ranked by exact cosine.

    recall: k -> fraction of queries with one of their label among the k nearest. mean_average_precision: over whole
    rankings. unlabelled: images left out. alone: images whose label no other has, which ask nothing.
    """

    of: str
    images: int = 0
    labels: int = 0
    queries: int = 0
    unlabelled: int = 0
    alone: int = 0
    recall: dict[int, float] = field(default_factory=dict)
    mean_average_precision: float = 0.0


def run(config: Config, *, store: str, of: str = "embeddings") -> Result:
    """Evaluate retrieval on the images of a store that have a label; settings: evaluate.recall_at.

    Raises RequestError without labels that two images share, and without embeddings.
    """
    started = time.monotonic()
    if of not in VECTOR_COLUMNS_OF_IMAGES:
        raise RequestError(f"--of is {of!r}, but it should be {' or '.join(VECTOR_COLUMNS_OF_IMAGES)}.")
    opened = Store.open(store, config)
    opened.requires("retrieval", embedding=True, images=True)
    images = opened.images.read(["image_id", "label", "embedding"]).sort_by("image_id")
    labelled = images.filter(pc.is_valid(images["label"]))
    if not len(labelled):
        raise RequestError(
            f"No image of {opened.uri} has a label, and retrieval compares labels: extract from folders or a manifest "
            "with labels."
        )
    labels = labelled["label"].to_pylist()
    if len({*labels}) == len(labels):
        raise RequestError(
            f"No two images of {opened.uri} have the same label ({len(labelled):,} images, each with its own): "
            "retrieval has nothing to find."
        )
    result = Result(new_run_id(), opened.uri, of, images=len(images), unlabelled=len(images) - len(labelled))
    report = RunReport("evaluate retrieval", opened.uri, config, result.run_id, {"of": of}, optional=True)
    with recorded(report, result, started):
        values = pc.list_flatten(labelled["embedding"]).to_numpy()
        found = retrieval_by_label(values.reshape(len(labelled), -1), labels, config.evaluate.recall_at)
        result.labels, result.queries, result.alone = len({*labels}), found.queries, found.alone
        result.recall = {k: round(value, 6) for k, value in found.recall.items()}
        result.mean_average_precision = round(found.mean_average_precision, 6)
    return result
