"""The layers of pipelines for import-linter, with the folders of jobs taken from the table of jobs."""

from __future__ import annotations

from typing import Any

from importlinter.contracts.layers import LayersContract

from pipelines.jobs import JOBS

JOBS_LAYER = "JOBS"


class LayersWithJobs(LayersContract):
    """A contract of layers in which JOBS stands for every job's folder; these are independent of each other."""

    type_name = "layers_with_jobs"

    def __init__(self, name: str, session_options: dict[str, Any], contract_options: dict[str, Any]) -> None:
        folders = sorted({job.module.split(".")[1] for job in JOBS.values()})
        layers = [" | ".join(folders) if layer == JOBS_LAYER else layer for layer in contract_options["layers"]]
        super().__init__(name, session_options, {**contract_options, "layers": layers})
