"""Every job, in one table: the command, what it may be given, what it reads and leaves, and what it counts.

The command line, pipelines, stats, trends and metrics read this table, and nothing lists jobs a second time. It loads
no library, so that `dinoray --help` is instant. A new job is a folder, a section of the settings and an entry here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

INPUT = "INPUT"  # what lies outside of the store and only a listing can tell
RESULTS = "results"  # everything that other jobs left in the store


@dataclass(frozen=True)
class Job:
    """A command that works on a store.

    module, function: what does it, mostly `run(config, *, store, ...)`. arguments: the parameters of the function
    besides config, store and dry_run, with the type that each takes; needed: those that must be given.

    reads: the tables that its result depends on, or INPUT, or RESULTS. files: arguments, or settings of its section
    of the same name, whose value may name a file that the result depends on, or `cluster:NAME`.

    section: of the settings, which decides what it makes besides the arguments. makes: the folder in which it leaves
    results by NAME, or "" where its result is not kept by name. output: the argument that names the file it makes.

    counts: keys of its result that add up to the work it did; unit: what they count, and the unit of its rate.
    """

    command: str
    module: str
    arguments: Mapping[str, type] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    section: str = ""
    makes: str = ""
    output: str = ""
    counts: tuple[str, ...] = ()
    unit: str = ""
    uses_ray: bool = True
    in_pipelines: bool = True
    plans: bool = True  # it takes dry_run
    function: str = "run"

    @property
    def always_runs(self) -> bool:
        """What it looks at shows in no table's version, so only running it tells whether there is something to do."""
        return not self.reads or INPUT in self.reads

    @property
    def run(self) -> Callable[..., Any]:
        """The function that does it; loads the libraries that it needs."""
        return getattr(importlib.import_module(self.module), self.function)


TABLES = ("images", "patches")

JOBS: dict[str, Job] = {
    job.command: job
    for job in (
        Job(
            "extract",
            "pipelines.extract",
            {"input": str, "prune": bool, "retry_failed": bool, "limit": int},
            needed=("input",),
            reads=(INPUT,),
            counts=("extracted", "failed"),
            unit="images",
        ),
        Job(
            "estimate",
            "pipelines.extract.estimate",
            {"input": str, "sample": int, "device": str, "cpus": int, "price": float},
            needed=("input",),
            reads=(INPUT,),
            unit="images",
            in_pipelines=False,
            plans=False,
        ),
        Job(
            "index",
            "pipelines.index",
            {"name": str},
            needed=("name",),
            reads=TABLES,
            section="index",
            makes="index",
            counts=("added", "changed", "removed"),
            unit="images",
            uses_ray=False,
        ),
        Job(
            "search",
            "pipelines.index.search",
            {"name": str, "image": str, "box": str, "top": int, "save": str},
            needed=("name", "image"),
            reads=(*TABLES, "index"),
            uses_ray=False,
            in_pipelines=False,
            plans=False,
        ),
        Job(
            "cluster",
            "pipelines.cluster",
            {"name": str, "update": bool, "elbow": bool},
            needed=("name",),
            reads=TABLES,
            section="cluster",
            makes="clusters",
            counts=("vectors",),
            unit="vectors",
        ),
        Job(
            "cosegment",
            "pipelines.cosegment",
            {"name": str, "sets": str, "masks": str, "overlays": str},
            needed=("name",),
            reads=TABLES,
            files=("sets",),
            section="cosegment",
            makes="parts",
            counts=("segmented",),
            unit="images",
        ),
        Job(
            "correspond",
            "pipelines.correspond",
            {"name": str, "pairs": str},
            needed=("name",),
            reads=TABLES,
            files=("pairs",),
            section="correspond",
            makes="matches",
            counts=("matched",),
            unit="pairs",
        ),
        Job(
            "train",
            "pipelines.train",
            {"input": str, "output": str},
            needed=("input", "output"),
            reads=(INPUT,),
            section="train",
            in_pipelines=False,
        ),
        *(
            Job(
                f"evaluate {task}",
                f"pipelines.evaluate.{module}",
                arguments,
                function=function,
                needed=needed,
                reads=TABLES,
                section="evaluate",
                uses_ray=False,
                in_pipelines=False,
                plans=False,
            )
            for task, module, function, arguments, needed in (
                ("pck", "pck", "run", {"annotations": str}, ("annotations",)),
                ("knn", "classify", "knn", {"test": str}, ()),
                ("linear", "classify", "linear", {"test": str}, ()),
                ("retrieval", "retrieval", "run", {"of": str}, ()),
                ("segmentation", "segmentation", "run", {"name": str, "masks": str}, ("name", "masks")),
                ("parts", "parts", "run", {"name": str, "annotations": str}, ("name", "annotations")),
            )
        ),
        Job(
            "report",
            "pipelines.report",
            {"output": str, "sample": int, "images": str, "query": str, "png": str},
            reads=(*TABLES, "failures", RESULTS),
            files=("images",),
            section="report",
            output="output",
            uses_ray=False,
        ),
        Job("verify", "pipelines.upkeep.verify", uses_ray=False, plans=False),
        Job(
            "compact",
            "pipelines.upkeep.compact",
            section="compact",
            counts=("merged", "vacuumed"),
            unit="files",
            uses_ray=False,
        ),
        Job("stats", "pipelines.upkeep.stats", uses_ray=False, in_pipelines=False, plans=False),
    )
}

PIPELINE_JOBS: dict[str, Job] = {command: job for command, job in JOBS.items() if job.in_pipelines}
