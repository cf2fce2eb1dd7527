"""The actors of a run of cluster: started with a share of the vectors each, and assigning all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines import storage
from pipelines.cluster.result import ClusterJob
from pipelines.cluster.vectors import Reading, list_units, split_units
from pipelines.results.cluster_models import Model
from pipelines.running.cpus import available_cpus
from pipelines.running.interrupts import interruptible
from pipelines.running.layout import Layout, plan_workers
from pipelines.running.progress import StatusLine
from pipelines.running.ray_session import explain_ray_error, ray_session
from pipelines.settings.sections import Config

if TYPE_CHECKING:
    from pipelines.cluster.training import Workers
    from pipelines.cluster.worker import ClusterSetup

# The matrix products of a row group make bad use of more.
MOST_CPUS_PER_WORKER = 4.0
CACHE_SHARE_OF_RAY_MEMORY = 1 / 3


@contextlib.contextmanager
def started_workers(job: ClusterJob, images: pa.Table) -> Iterator[tuple[Workers, StatusLine]]:
    """Ray actors that hold the vectors of `images`."""
    from ray.exceptions import RayError

    from pipelines.cluster.training import Workers
    from pipelines.cluster.worker import ClusterWorker

    began = time.monotonic()
    asked = job.asked
    units = list_units(job.store, asked, images)
    with ray_session(job.config.run) as resources, interruptible(), StatusLine() as line:
        import ray

        layout = plan_cluster_workers(resources, job.config)
        shares = split_units(units, layout.workers)
        memory = resources.get("memory", 0.0) * CACHE_SHARE_OF_RAY_MEMORY
        budget = asked.cache_gb * 1e9 if asked.cache_gb is not None else memory
        setup = worker_setup(job, layout.device, layout.cpus, budget / max(len(shares), 1))
        # restarted forever, each call tried again: a worker keeps nothing that it cannot read again
        actor = ray.remote(ClusterWorker).options(
            num_cpus=layout.cpus,
            num_gpus=layout.gpus,
            max_restarts=-1,
            max_task_retries=3,
            scheduling_strategy="SPREAD",
        )
        actors = [actor.remote(setup, share) for share in shares]
        job.result.seconds["start"] = time.monotonic() - began
        try:
            workers = Workers(actors)
            yield workers, line
            job.result.held_share = workers.held_share()
        except RayError as error:
            raise explain_ray_error(error, "the clustering") from None
        finally:
            for one in actors:
                ray.kill(one)


def plan_cluster_workers(resources: Mapping[str, float], config: Config) -> Layout:
    """Workers for a cluster with `resources`. Raises RequestError when it does not have what was asked for."""
    many_cpus = resources.get("CPU", 1.0) > MOST_CPUS_PER_WORKER
    return plan_workers(resources, config, usual_cpus=MOST_CPUS_PER_WORKER if many_cpus else 1.0)


def worker_setup(job: ClusterJob, device: str, cpus: float, cache_bytes: float) -> ClusterSetup:
    from pipelines.cluster.worker import ClusterSetup

    return ClusterSetup(
        reading=Reading.of_store(job.store, job.asked),
        spherical=job.asked.metric == "cosine",
        salient_above=job.store.config.store.salient_threshold,
        seed=job.asked.seed,
        device=device,
        threads=max(1, int(min(cpus, available_cpus()))),
        cache_bytes=cache_bytes,
    )


def assign(job: ClusterJob, workers: Workers, model: Model) -> list[Any]:
    """Files of assignments (WrittenFile); they show only once committed."""
    began = time.monotonic()
    written = workers.write(model.levels, storage.join(job.uri, "assignments"), model.progress.run_id)
    job.result.seconds["assign"] = time.monotonic() - began
    rows = sum(file.file.rows for file in written)
    if rows:
        job.result.mean_distance = sum(file.distance for file in written) / rows
    return written
