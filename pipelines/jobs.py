"""Every job, in one table: its command and arguments, what it reads and leaves, and what it counts.

The command line, pipelines, stats, trends, metrics and `import dinoray` read this table, and nothing lists jobs a
second time. It loads no library, so that `dinoray --help` is instant. A new job is a folder, a section of the settings
and an entry here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# INPUT lies outside the store, so that only a listing says what it holds.
INPUT = "INPUT"
RESULTS_OF_ALL_JOBS = "results"
EXTRACTION = ("images", "patches")
# What the report of a pipeline calls itself; its jobs have reports of their own.
PIPELINE_COMMAND = "run"
# Before the name of a clustering, where a value names one: cluster:NAME.
CLUSTERING_PREFIX = "cluster:"
REPORT_IN_STORE = "report.html"


@dataclass(frozen=True)
class Argument:
    """An argument of a command and of the function that does the job.

    kind: str, int, float or bool (a flag). metavar: how help calls its value. position: it stands on the command line
    without a name, and must be given; so must a named one that is `needed`. least: smallest number. many: it may be
    given several times. short: a second, short name on the command line.

    setting: on the command line it stands for this setting, such as cluster.k, and the function does not have it.
    """

    name: str
    help: str
    kind: type = str
    metavar: str | None = None
    position: bool = False
    needed: bool = False
    default: Any = None
    least: float | None = None
    many: bool = False
    short: str = ""
    setting: str = ""


@dataclass(frozen=True)
class Job:
    """A command that works on a store.

    help: what the command says of itself. module, function: what does it, mostly `run(config, *, store, ...)`.

    reads: the tables that its result depends on, or INPUT, or RESULTS_OF_ALL_JOBS. files: arguments, or settings of its
    section with the same name, whose value may name a file that the result depends on, or `cluster:NAME`. section: the
    section of the settings that decides, besides the arguments, what it makes.

    makes: the folder in which it leaves results by NAME. output: the argument that names the file it writes;
    default_output: its name in the store where it is not given.

    counts: keys of its result that add up to the work it did. unit: what they count, and the unit of its rate. changes:
    keys of its result which, where all of them are 0, say that there was nothing to do; of jobs that always run.

    plans: the function takes dry_run; else a dry run says the command, or `verb` in its place, and its arguments.
    """

    command: str
    help: str
    module: str
    all_arguments: tuple[Argument, ...]
    function: str = "run"
    reads: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    section: str = ""
    makes: str = ""
    output: str = ""
    default_output: str = ""
    counts: tuple[str, ...] = ()
    unit: str = ""
    changes: tuple[str, ...] = ()
    uses_ray: bool = True
    in_pipelines: bool = True
    plans: bool = True
    verb: str = ""

    @property
    def parameters(self) -> dict[str, Argument]:
        """The parameters of its function besides the configuration and dry_run, by name."""
        return {argument.name: argument for argument in self.all_arguments if not argument.setting}

    @property
    def arguments(self) -> dict[str, Argument]:
        """Those parameters besides the store."""
        return {name: argument for name, argument in self.parameters.items() if name != "store"}

    @property
    def always_runs(self) -> bool:
        """No table's version shows whether there is something to do, so it has to run."""
        return not self.reads or INPUT in self.reads

    @property
    def run(self) -> Callable[..., Any]:
        """The function that does it; loads the libraries that it needs."""
        return getattr(importlib.import_module(self.module), self.function)


_STORE = Argument("store", "Folder or URI of a store.", metavar="STORE", position=True)
_INPUT = Argument(
    "input",
    "Folder, prefix, glob, .tar shards, manifest (.csv .jsonl .parquet) or Parquet dataset.",
    metavar="INPUT",
    position=True,
)


def _name(of: str) -> Argument:
    return Argument("name", of, metavar="NAME", position=True)


def _option(name: str, help: str, metavar: str | None = None, **more: Any) -> Argument:
    return Argument(name, help, metavar=metavar, **more)


def _flag(name: str, help: str) -> Argument:
    return Argument(name, help, kind=bool, default=False)


_MADE_BY_COSEGMENT = _name("Name of a co-segmentation that `dinoray cosegment` made.")
_TEST_STORE = _option("test", "Store of the images to test, of the same spec; default: STORE itself.", "STORE")

_ALL = (
    Job(
        "extract",
        "Images to tables: one row per image, one row per patch, one row per failure. Run it again to add what is new.",
        "pipelines.extract",
        (
            _INPUT,
            _STORE,
            _flag("prune", "Remove rows of images that are no longer in INPUT."),
            _flag("retry_failed", "Try recorded failures again."),
            _option("limit", "Extract at most this many of the remaining images.", kind=int, least=1),
        ),
        reads=(INPUT,),
        counts=("extracted", "failed"),
        unit="images",
        changes=("extracted", "pruned"),
    ),
    Job(
        "estimate",
        "What an extraction will take: bytes, files, FLOPs, hours and cost, from extracting a sample. Nothing is kept.",
        "pipelines.extract.estimate",
        (
            _INPUT,
            _STORE,
            _option("sample", "How many images to extract for the estimate.", kind=int, default=128, least=1),
            _option("device", "Also estimate for h200 h100 a100 l40s rtx4090 a10g l4 v100 t4."),
            _option("cpus", "CPUs that decode for --device.", kind=int, default=16, least=1),
            _option("price", "Price of an hour of the device, any currency.", kind=float, least=0),
        ),
        reads=(INPUT,),
        unit="images",
        in_pipelines=False,
        plans=False,
    ),
    Job(
        "cluster",
        "Patches, or whole images, to clusters: k-means over the store. "
        "The same command continues one that was killed.",
        "pipelines.cluster",
        (
            _STORE,
            _name("Name of the result: clusters/NAME in the store."),
            _option("k", "Clusters; wins over cluster.k.", kind=int, least=1, setting="cluster.k"),
            _flag("elbow", "Choose k, at most cluster.k; see cluster.elbow (here 0.975 when it is not set)."),
            _option("of", "What is clustered; wins over cluster.of.", "patches|embeddings", setting="cluster.of"),
            _flag("update", "Keep the centroids; assign images that are new or changed."),
        ),
        reads=EXTRACTION,
        section="cluster",
        makes="clusters",
        counts=("vectors",),
        unit="vectors",
    ),
    Job(
        "cosegment",
        "Sets of images to masks: their common foreground and its parts. Run it again to add what is new.",
        "pipelines.cosegment",
        (
            _STORE,
            _name("Name of the result: parts/NAME in the store."),
            _option(
                "sets", "Which images belong together; wins over cosegment.sets.", "label|directory|cluster:NAME|FILE"
            ),
            _option("masks", "Also write masks as PNG files.", "DIR"),
            _option("overlays", "Also draw parts and outlines over the images.", "DIR"),
        ),
        reads=EXTRACTION,
        files=("sets",),
        section="cosegment",
        makes="parts",
        counts=("segmented",),
        unit="images",
    ),
    Job(
        "train",
        "Images to weights: DINO self-distillation on your own images. "
        "The same command continues one that was stopped.",
        "pipelines.train",
        (
            _INPUT,
            Argument(
                "output", "Folder or URI for weights, checkpoints, log and model card.", metavar="OUTPUT", position=True
            ),
        ),
        reads=(INPUT,),
        section="train",
        in_pipelines=False,
    ),
    Job(
        "index",
        "Embeddings or patches to an index for search. Run it again to bring it up to date.",
        "pipelines.index",
        (_STORE, _name("Name of the index: index/NAME in the store.")),
        reads=EXTRACTION,
        section="index",
        makes="index",
        counts=("added", "changed", "removed"),
        unit="images",
        uses_ray=False,
    ),
    Job(
        "search",
        "The images nearest to an image, or the patches nearest to a part of it and where they are.",
        "pipelines.index.search",
        (
            _STORE,
            _name("Name of an index that `dinoray index` made."),
            Argument("image", "Path or URI of any image, or an image_id.", metavar="IMAGE", position=True),
            _option("box", "Pixels of IMAGE: where else does this part occur?", "X0,Y0,X1,Y1"),
            _option("top", "How many to find.", kind=int, default=10, least=1),
            _option("save", "Also draw what was found.", "FILE.png"),
        ),
        reads=(*EXTRACTION, "index"),
        uses_ray=False,
        in_pipelines=False,
        plans=False,
    ),
    Job(
        "correspond",
        "Pairs of images to tables: which patch matches which. Run it again to add what is new.",
        "pipelines.correspond",
        (
            _STORE,
            _name("Name of the result: matches/NAME in the store."),
            _option("pairs", "Which images to match; wins over correspond.pairs.", "knn:K|all|FILE"),
        ),
        reads=EXTRACTION,
        files=("pairs",),
        section="correspond",
        makes="matches",
        counts=("matched",),
        unit="pairs",
    ),
    *(
        Job(
            f"evaluate {task}",
            help,
            f"pipelines.evaluate.{module}",
            (_STORE, *arguments),
            function,
            reads=EXTRACTION,
            section="evaluate",
            uses_ray=False,
            in_pipelines=False,
            plans=False,
        )
        for task, module, function, help, arguments in (
            (
                "pck",
                "pck",
                "run",
                "Point correspondence on annotated pairs of images: the fraction of key points carried over correctly "
                "(PCK).",
                [
                    _option(
                        "annotations", "Folder in the layout of PF-WILLOW or SPair-71k.", metavar="PATH", needed=True
                    )
                ],
            ),
            (
                "knn",
                "classify",
                "knn",
                "Whether the nearest images, voting, find an image's label: k-NN accuracy of the embeddings.",
                [_TEST_STORE],
            ),
            (
                "linear",
                "classify",
                "linear",
                "Whether a linear classifier of the embeddings finds an image's label: linear-probe accuracy.",
                [_TEST_STORE],
            ),
            (
                "retrieval",
                "retrieval",
                "run",
                "Whether the nearest images have the same label: recall@k and mean average precision (mAP).",
                [_option("of", "Vectors that are compared.", metavar="embeddings", default="embeddings")],
            ),
            (
                "segmentation",
                "segmentation",
                "run",
                "The common foreground against annotated masks: Jaccard, precision and CorLoc.",
                [
                    _MADE_BY_COSEGMENT,
                    _option("masks", "Annotated masks, named like the images; > 127 is inside.", "FOLDER", needed=True),
                ],
            ),
            (
                "parts",
                "parts",
                "run",
                "Parts against part labels or key points: normalised mutual information (NMI) and adjusted Rand index "
                "(ARI).",
                [
                    _MADE_BY_COSEGMENT,
                    _option(
                        "annotations",
                        "Part labels, named like the images, or key points in the layout of PF-WILLOW or SPair-71k.",
                        "FOLDER",
                        needed=True,
                    ),
                ],
            ),
        )
    ),
    Job(
        "report",
        "See it: photos with what was found in them, and where a patch occurs in all others, as one HTML file.",
        "pipelines.report",
        (
            _STORE,
            _option("output", f"Default: {REPORT_IN_STORE} in the store.", "FILE", short="-o"),
            _option("sample", "How many images to show.", kind=int, least=1),
            _option("images", "An image_id, or a file that lists some; repeatable.", "ID|FILE", many=True),
            _option("query", "Which images: SELECT image_id FROM images WHERE ... (DuckDB).", "SQL"),
            _option("png", "Also write the plots as PNG files.", "DIR"),
        ),
        reads=(*EXTRACTION, "failures", RESULTS_OF_ALL_JOBS),
        files=("images",),
        section="report",
        output="output",
        default_output=REPORT_IN_STORE,
        uses_ray=False,
    ),
    Job(
        "verify",
        "Check that a store is sound: every image has all its patches, files and logs agree. Exit 1 if not.",
        "pipelines.upkeep.verify",
        (_STORE, _flag("deep", "Read every page of every table, and compare it with its checksum.")),
        uses_ray=False,
        plans=False,
    ),
    Job(
        "repair",
        "Mend what verify finds, or remove rows so that their commands make them again, or say what else can be done.",
        "pipelines.upkeep.repair",
        (_STORE,),
        counts=("mended",),
        unit="findings",
        uses_ray=False,
    ),
    Job(
        "compact",
        "Merge the small files that many runs leave, and remove what no snapshot within compact.retention_hours needs.",
        "pipelines.upkeep.compact",
        (_STORE,),
        section="compact",
        counts=("merged", "vacuumed"),
        unit="files",
        uses_ray=False,
    ),
    Job(
        "stats",
        "A store at a glance: rows, files, bytes, failures by reason, and its runs.",
        "pipelines.upkeep.stats",
        (_STORE,),
        uses_ray=False,
        in_pipelines=False,
        plans=False,
        verb="read",
    ),
)

JOBS: dict[str, Job] = {job.command: job for job in _ALL}
PIPELINE_JOBS: dict[str, Job] = {job.command: job for job in _ALL if job.in_pipelines}
