"""The workers of a job on a cluster and what each takes: one plan from what there is and what was asked for.

Ray waits forever for a worker that fits nowhere, so every job asks here before it starts one, and is refused in one
sentence what the cluster does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.errors import RequestError, counted
from pipelines.settings.sections import Config

LARGEST_NODE_CPUS_KEY, LARGEST_NODE_GPUS_KEY = "largest_node_cpus", "largest_node_gpus"
ROUNDING = 1e-6


@dataclass(frozen=True)
class Layout:
    """The workers of a job. device: cpu or cuda. cpus, gpus: what each worker takes."""

    device: str
    workers: int
    cpus: float
    gpus: float


def device_of(resources: Mapping[str, float], config: Config) -> str:
    """cpu or cuda, as model.device asks and the cluster has it; cpu where run.gpus_per_worker is 0.

    Raises RequestError where a GPU was asked for and there is none.
    """
    without_gpus = config.run.gpus_per_worker == 0
    if config.model.device == "cuda" and without_gpus:
        raise RequestError(
            "model.device is cuda, but run.gpus_per_worker is 0: give model.device=auto or cpu, or a larger "
            "run.gpus_per_worker."
        )
    if config.model.device == "cuda" and not resources.get("GPU"):
        raise RequestError("model.device is cuda, but the Ray cluster has no GPU: give model.device=auto or cpu.")
    return "cuda" if config.model.device != "cpu" and resources.get("GPU") and not without_gpus else "cpu"


def plan_workers(
    resources: Mapping[str, float],
    config: Config,
    *,
    usual_cpus: float,
    usual_gpus: float = 1.0,
    most_cpus: float | None = None,
    least_cpus: float = 0.0,
    reserved_cpus: float = 0.0,
    most_workers: int | None = None,
    uses_gpu: bool = True,
    whole_cpus: bool = False,
) -> Layout:
    """Workers for a cluster with `resources`, as run.workers and the like ask.

    Args:
        resources: {"CPU": ..., "GPU": ...}, and under LARGEST_NODE_CPUS_KEY and LARGEST_NODE_GPUS_KEY what its largest
            node has, where that is known.
        usual_cpus, usual_gpus: what a worker takes where the settings do not say.
        most_cpus, least_cpus: bounds of a worker's share of the CPUs; default: at most usual_cpus.
        reserved_cpus: CPUs that are not for these workers.
        most_workers: how many are worth starting, where run.workers does not say.
        uses_gpu: whether a worker takes a GPU where there are any.
        whole_cpus: on GPUs, start fewer workers rather than give each less than usual_cpus.

    Raises RequestError when the cluster does not have what was asked for.
    """
    run = config.run
    device = device_of(resources, config)
    cpus, gpus = resources.get("CPU", 1.0) - reserved_cpus, resources.get("GPU", 0.0)
    gpus_each = (run.gpus_per_worker or usual_gpus) if device == "cuda" and uses_gpu else 0.0
    by_cpus = cpus / (run.cpus_per_worker or usual_cpus)
    by_gpus = gpus / gpus_each if gpus_each else by_cpus
    fitting = max(1, int(min(by_cpus, by_gpus) if whole_cpus else by_gpus))
    workers = run.workers or min(fitting, most_workers or fitting)
    cpus_each = run.cpus_per_worker or max(least_cpus, min(most_cpus or usual_cpus, cpus / workers))
    layout = Layout(device, workers, cpus_each, gpus_each)
    _check(layout, cpus, gpus, resources)
    return layout


def _check(layout: Layout, cpus: float, gpus: float, resources: Mapping[str, float]) -> None:
    one = layout.workers == 1
    asked = (
        f"{counted(layout.workers, 'worker')} with {amount(layout.cpus, 'CPU')} and "
        f"{amount(layout.gpus, 'GPU')}{'' if one else ' each'} {'was' if one else 'were'} asked for"
    )
    remedy = "lower run.workers, run.cpus_per_worker or run.gpus_per_worker."
    too_many_cpus = layout.cpus * layout.workers > cpus + ROUNDING
    if too_many_cpus or layout.gpus * layout.workers > gpus + ROUNDING:
        raise RequestError(
            f"{asked}, but the cluster has {amount(cpus, 'CPU')} to give and {amount(gpus, 'GPU')}: {remedy}"
        )
    node_cpus, node_gpus = resources.get(LARGEST_NODE_CPUS_KEY, cpus), resources.get(LARGEST_NODE_GPUS_KEY, gpus)
    if layout.cpus > node_cpus + ROUNDING or layout.gpus > node_gpus + ROUNDING:
        raise RequestError(
            f"{asked}, but a worker runs on one node, and no node of the cluster has more than "
            f"{amount(node_cpus, 'CPU')} and {amount(node_gpus, 'GPU')}: {remedy}"
        )


def amount(count: float, what: str) -> str:
    """A number with its noun: 1 CPU, 2.5 CPUs."""
    return f"{count:g} {what}{'' if count == 1 else 's'}"
