"""evaluate retrieval: do the nearest images have the same label? Recall@k and mAP from the embeddings of a store."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from dino_ops.metrics import retrieval_by_label
from pipelines.errors import RequestError
from pipelines.evaluate.reports import write_report
from pipelines.running.reports import RunReport, new_run_id
from pipelines.settings.sections import Config
from pipelines.store.store import Store

VECTOR_COLUMNS_OF_IMAGES = ("embeddings",)


@dataclass
class Result:
    """Retrieval by label: every image asks for others of its label, ranked by exact cosine.

    recall: k -> fraction of queries with one of their label among the k nearest. mean_average_precision: over whole
    rankings. unlabelled: images left out. alone: images whose label no other has, which ask nothing.
    """

    run_id: str
    store: str
    of: str
    images: int
    labels: int
    queries: int
    unlabelled: int
    alone: int
    recall: dict[int, float]
    mean_average_precision: float
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__


def run(config: Config, *, store: str, of: str = "embeddings") -> Result:
    """Evaluate retrieval on the images of a store that have a label; settings: evaluate.recall_at.

    Raises RequestError without labels that two images share, and without embeddings.
    """
    started = time.monotonic()
    if of not in VECTOR_COLUMNS_OF_IMAGES:
        raise RequestError(f"--of is {of!r}, but it should be {' or '.join(VECTOR_COLUMNS_OF_IMAGES)}.")
    opened = Store.open(store, config)
    if not opened.config.features.embedding:
        raise RequestError(f"The store {opened.uri} has no embeddings (it was made with features.embedding=false).")
    images = opened.images.read(["image_id", "label", "embedding"]).sort_by("image_id")
    if not len(images):
        raise RequestError(f"The store {opened.uri} has no images: extract some first.")
    labelled = images.filter(pc.is_valid(images["label"]))
    if not len(labelled):
        raise RequestError(
            f"No image of {opened.uri} has a label, and retrieval compares labels: extract from folders or a manifest "
            "with labels."
        )
    run_id = new_run_id()
    report = RunReport("evaluate retrieval", opened.uri, config, run_id, {"of": of})

    labels = labelled["label"].to_pylist()
    values = pc.list_flatten(labelled["embedding"]).to_numpy()
    embeddings = values.reshape(len(labelled), -1)
    found = retrieval_by_label(embeddings, labels, config.evaluate.recall_at)
    if not found.queries:
        raise RequestError(
            f"No two images of {opened.uri} have the same label ({len(labelled):,} images, each with its own): "
            "retrieval has nothing to find."
        )
    result = Result(
        run_id=run_id,
        store=opened.uri,
        of=of,
        images=len(images),
        labels=len({*labels}),
        queries=found.queries,
        unlabelled=len(images) - len(labelled),
        alone=found.alone,
        recall={k: round(value, 6) for k, value in found.recall.items()},
        mean_average_precision=round(found.mean_average_precision, 6),
        seconds=round(time.monotonic() - started, 2),
    )
    result.messages += write_report(report, result.as_dict())
    return result
