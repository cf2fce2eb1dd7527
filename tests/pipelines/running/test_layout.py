"""The workers of every job: what fits, and one sentence for what does not."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.cluster.actors import plan_cluster_workers
from pipelines.correspond.tiles import plan_matching
from pipelines.cosegment.tasks import plan_segmentation
from pipelines.errors import RequestError
from pipelines.extract.layout import ModelFacts, plan_extraction
from pipelines.running.layout import LARGEST_NODE_CPUS_KEY, LARGEST_NODE_GPUS_KEY, Layout, plan_workers
from pipelines.settings import load_config
from pipelines.train.job import plan_layout

FACTS = ModelFacts(patch_size=16, dims={"descriptor": 384}, patches=196, depth=12, width=384)
PLANS: dict[str, Any] = {
    "extract": lambda resources, config: plan_extraction(resources, config, FACTS, images=1_000_000),
    "cluster": plan_cluster_workers,
    "cosegment": plan_segmentation,
    "correspond": plan_matching,
    "train": lambda resources, config: plan_layout(resources, config, batch_size=64),
}


@pytest.mark.parametrize("job", PLANS)
def test_a_worker_larger_than_the_cluster_is_refused(job: str) -> None:
    """Ray would wait for it for ever."""
    with pytest.raises(RequestError, match=r"^1 worker with 64 CPUs and 0 GPUs was asked for, but the"):
        PLANS[job]({"CPU": 2.0}, load_config([], ["run.cpus_per_worker=64"]))


@pytest.mark.parametrize("job", PLANS)
def test_a_worker_larger_than_every_node_is_refused(job: str) -> None:
    resources = {"CPU": 8.0, LARGEST_NODE_CPUS_KEY: 2.0, LARGEST_NODE_GPUS_KEY: 0.0}
    with pytest.raises(RequestError, match="no node of the cluster has more than 2 CPUs and 0 GPUs"):
        PLANS[job](resources, load_config([], ["run.cpus_per_worker=4", "run.workers=1"]))


@pytest.mark.parametrize("job", PLANS)
def test_a_gpu_that_is_not_there_is_refused(job: str) -> None:
    """cosegment too, which needs the model for crops only: a request that cannot be met is not met in silence."""
    with pytest.raises(RequestError, match="but the Ray cluster has no GPU"):
        PLANS[job]({"CPU": 2.0}, load_config([], ["model.device=cuda"]))


@pytest.mark.parametrize("job", PLANS)
def test_no_gpus_for_a_worker_are_none(job: str) -> None:
    resources = {"CPU": 8.0, "GPU": 2.0}
    layout = PLANS[job](resources, load_config([], ["run.gpus_per_worker=0"]))
    assert (layout.device, layout.gpus) == ("cpu", 0.0)
    with pytest.raises(RequestError, match=r"model.device is cuda, but run.gpus_per_worker is 0"):
        PLANS[job](resources, load_config([], ["run.gpus_per_worker=0", "model.device=cuda"]))


@pytest.mark.parametrize("job", PLANS)
@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (6, 0), (64, 0), (1, 1), (6, 1), (8, 8), (64, 8)])
def test_what_is_planned_fits(job: str, cpus: float, gpus: float) -> None:
    layout = PLANS[job]({"CPU": cpus, "GPU": gpus}, load_config())
    assert layout.workers >= 1 and layout.cpus > 0
    assert layout.workers * layout.cpus <= cpus + 1e-6
    assert layout.workers * layout.gpus <= gpus
    assert layout.device == ("cuda" if gpus else "cpu")


def test_segmentation_takes_a_gpu_for_crops_only() -> None:
    resources = {"CPU": 8.0, "GPU": 1.0}
    assert plan_segmentation(resources, load_config()) == Layout("cuda", 8, 1.0, 0.0)
    assert plan_segmentation(resources, load_config([], ["cosegment.crop_augmentations=2"])) == Layout(
        "cuda", 4, 1.0, 0.25
    )


def test_tasks_take_whole_cpus_and_actors_share_them() -> None:
    resources, config = {"CPU": 2.0, "GPU": 4.0}, load_config()
    assert plan_workers(resources, config, usual_cpus=1.0) == Layout("cuda", 4, 0.5, 1.0)
    assert plan_workers(resources, config, usual_cpus=1.0, whole_cpus=True) == Layout("cuda", 2, 1.0, 1.0)


def test_no_more_workers_than_are_worth_starting_unless_asked() -> None:
    assert plan_workers({"CPU": 8.0}, load_config(), usual_cpus=1.0, most_cpus=4.0, most_workers=2).workers == 2
    asked = plan_workers({"CPU": 8.0}, load_config([], ["run.workers=5"]), usual_cpus=1.0, most_workers=2)
    assert (asked.workers, asked.cpus) == (5, 1.0)
