"""The command `dinoray`. Parses, loads the configuration, calls the job, prints where the results are.

Loads neither torch nor Ray nor pyarrow: jobs are imported when they are called, so that --help is instant.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipelines import cli_output
from pipelines.errors import exit_code_of
from pipelines.running import json_log

LOG_JSON = "--log-json"


class Commands(TyperGroup):
    """All commands. With --log-json standard error is lines of JSON, whatever happens."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        if LOG_JSON not in arguments:
            return super().main(arguments, prog_name, complete_var, standalone_mode, windows_expand_args, **extra)
        words = [argument for argument in arguments if not argument.startswith("-")]
        with json_log.json_log(" ".join(words[: 2 if words[:1] == ["evaluate"] else 1])):
            json_log.event("started")
            sys.exit(self._exit_code(arguments, prog_name))

    def _exit_code(self, arguments: list[str], prog_name: str | None) -> int:
        try:
            return super().main(arguments, prog_name, standalone_mode=False) or 0
        except Exception as error:
            if not hasattr(error, "format_message"):
                json_log.broke(error)
                return 1
            code = int(getattr(error, "exit_code", 2))  # of arguments that cannot be parsed
            _complain(error.format_message(), code, as_json="--json" in arguments)
            return code


app = typer.Typer(
    cls=Commands,
    name="dinoray",
    help="Turn image datasets into tables of DINO-ViT features, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFiles = Annotated[list[Path] | None, typer.Option("-c", "--config", help="YAML settings; later files win.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; wins over files.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the effective configuration and the plan; do nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output; the rest on standard error.")]
# `Commands` sees to it, so that what goes wrong before a command is called is a line too
LogJson = Annotated[bool, typer.Option(LOG_JSON, help="Standard error as lines of JSON: progress, messages, errors.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URI of a store.")]


@app.command()
def extract(
    input: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Folder, prefix, glob, .tar shards, manifest (.csv .jsonl .parquet) or Parquet dataset.",
        ),
    ],
    store: StoreArgument,
    prune: Annotated[bool, typer.Option("--prune", help="Remove rows of images gone from INPUT.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try recorded failures again.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most this many of the images left.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Images to tables: one row per image, one row per patch, one row per failure. Run it again to add what is new."""

    def job(settings: Any) -> Any:
        from pipelines.extract.job import run

        return run(
            settings,
            input=input,
            store=store,
            prune=prune,
            retry_failed=retry_failed,
            limit=limit,
            dry_run=dry_run,
        )

    _run_job(job, cli_output.print_extract, config, overrides, dry_run=dry_run, as_json=as_json)


@app.command()
def estimate(
    input: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Folder, prefix, glob, .tar shards, manifest (.csv .jsonl .parquet) or Parquet dataset.",
        ),
    ],
    store: StoreArgument,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Images that are extracted to find out.")] = 128,
    device: Annotated[
        str | None, typer.Option("--device", help="Also reckon for h200 h100 a100 l40s rtx4090 a10g l4 v100 t4.")
    ] = None,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="CPUs beside --device, for decoding.")] = 16,
    price: Annotated[float | None, typer.Option("--price", min=0, help="An hour of the device, any currency.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """What an extraction will take: bytes, files, FLOPs, hours and cost, from extracting a sample. Nothing is kept."""

    def job(settings: Any) -> Any:
        from pipelines.extract.estimate import run

        return run(settings, input=input, store=store, sample=sample, device=device, cpus=cpus, price=price)

    _run_job(
        job,
        cli_output.print_estimate,
        config,
        overrides,
        dry_run=dry_run,
        as_json=as_json,
        reads_only=f"estimate {input}",
    )


@app.command()
def cluster(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the result: clusters/NAME in the store.")],
    k: Annotated[int | None, typer.Option("--k", min=1, help="Clusters; wins over cluster.k.")] = None,
    elbow: Annotated[
        bool,
        typer.Option("--elbow", help="Choose k, at most cluster.k; see cluster.elbow (here 0.975 when it is not set)."),
    ] = False,
    of: Annotated[
        str | None, typer.Option("--of", metavar="patches|embeddings", help="What is clustered; wins over cluster.of.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Keep the centroids there are; assign images that are new or changed.")
    ] = False,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Patches, or whole images, to clusters: k-means over the store. The same command continues one that was killed."""

    def job(settings: Any) -> Any:
        from pipelines.cluster.job import run

        return run(settings, store=store, name=name, elbow=elbow, update=update, dry_run=dry_run)

    asked = [*(overrides or ())]
    asked += [f"cluster.k={k}"] if k is not None else []
    asked += [f"cluster.of={of}"] if of is not None else []
    _run_job(job, cli_output.print_cluster, config, asked, dry_run=dry_run, as_json=as_json)


@app.command()
def cosegment(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the result: parts/NAME in the store.")],
    sets: Annotated[
        str | None,
        typer.Option(
            "--sets",
            metavar="label|directory|cluster:NAME|FILE",
            help="Which images belong together; wins over cosegment.sets.",
        ),
    ] = None,
    masks: Annotated[str | None, typer.Option("--masks", metavar="DIR", help="Also write masks as PNG files.")] = None,
    overlays: Annotated[
        str | None, typer.Option("--overlays", metavar="DIR", help="Also draw parts and outlines over the images.")
    ] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Sets of images to masks: their common foreground and its parts. Run it again to add what is new."""

    def job(settings: Any) -> Any:
        from pipelines.cosegment.job import run

        return run(settings, store=store, name=name, sets=sets, masks=masks, overlays=overlays, dry_run=dry_run)

    _run_job(job, cli_output.print_cosegment, config, overrides, dry_run=dry_run, as_json=as_json)


@app.command()
def train(
    input: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Folder, prefix, glob, .tar shards, manifest (.csv .jsonl .parquet) or Parquet dataset.",
        ),
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Folder or URI for weights, checkpoints, log and model card.")
    ],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Images to weights: DINO self-distillation on your own images. The same command continues one that was stopped."""

    def job(settings: Any) -> Any:
        from pipelines.train.job import run

        return run(settings, input=input, output=output, dry_run=dry_run)

    _run_job(job, cli_output.print_train, config, overrides, dry_run=dry_run, as_json=as_json)


@app.command()
def index(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the index: index/NAME in the store.")],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Embeddings or patches to an index for search. Run it again to bring it up to date."""

    def job(settings: Any) -> Any:
        from pipelines.index.job import run

        return run(settings, store=store, name=name, dry_run=dry_run)

    _run_job(job, cli_output.print_index, config, overrides, dry_run=dry_run, as_json=as_json)


@app.command()
def search(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of an index that `dinoray index` made.")],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Path or URI of any image, or an image_id.")],
    box: Annotated[
        str | None,
        typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Pixels of IMAGE: where else does this part occur?"),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many to find.")] = 10,
    save: Annotated[str | None, typer.Option("--save", metavar="FILE.png", help="Also draw what was found.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """The images nearest to an image, or the patches nearest to a part of it and where they are."""

    def job(settings: Any) -> Any:
        from pipelines.index.search import run

        return run(settings, store=store, name=name, image=image, box=box, top=top, save=save)

    _run_job(
        job,
        cli_output.print_search,
        config,
        overrides,
        dry_run=dry_run,
        as_json=as_json,
        reads_only=f"search {store} {name}",
    )


@app.command()
def correspond(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the result: matches/NAME in the store.")],
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", metavar="knn:K|all|FILE", help="Which images to match; wins over correspond.pairs."),
    ] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Pairs of images to tables: which patch matches which. Run it again to add what is new."""

    def job(settings: Any) -> Any:
        from pipelines.correspond.job import run

        return run(settings, store=store, name=name, pairs=pairs, dry_run=dry_run)

    _run_job(job, cli_output.print_correspond, config, overrides, dry_run=dry_run, as_json=as_json)


class TaskGroup(TyperGroup):
    """Commands that are tasks: an unknown one is answered with those there are."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            message = f"There is no task {args[0]!r} to evaluate: choose {' or '.join(self.commands)}."
            _complain(message, 2, as_json="--json" in args)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)


evaluate = typer.Typer(cls=TaskGroup, no_args_is_help=True)
app.add_typer(evaluate, name="evaluate", help="How good the features of a store are: dinoray evaluate TASK STORE.")


@evaluate.command("pck")
def evaluate_pck(
    store: StoreArgument,
    annotations: Annotated[
        str, typer.Option("--annotations", metavar="PATH", help="Folder in the layout of PF-WILLOW or SPair-71k.")
    ],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Point correspondence on annotated pairs of images: the fraction of key points carried over correctly (PCK)."""

    def job(settings: Any) -> Any:
        from pipelines.evaluate.pck import run

        return run(settings, store=store, annotations=annotations)

    plan = f"evaluate pck of {store} with {annotations}"
    _run_job(job, cli_output.print_pck, config, overrides, dry_run=dry_run, as_json=as_json, reads_only=plan)


TestStore = Annotated[
    str | None,
    typer.Option("--test", metavar="STORE", help="Images to be tested, of the same spec; default: STORE's own."),
]


@evaluate.command("knn")
def evaluate_knn(
    store: StoreArgument,
    test: TestStore = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Whether the nearest images, voting, find an image's label: k-NN accuracy of the embeddings."""
    _run_job(
        _classification("knn", store, test),
        cli_output.print_classification,
        config,
        overrides,
        dry_run=dry_run,
        as_json=as_json,
        reads_only=f"evaluate knn of {store}",
    )


@evaluate.command("linear")
def evaluate_linear(
    store: StoreArgument,
    test: TestStore = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Whether a linear classifier of the embeddings finds an image's label: linear-probe accuracy."""
    _run_job(
        _classification("linear", store, test),
        cli_output.print_classification,
        config,
        overrides,
        dry_run=dry_run,
        as_json=as_json,
        reads_only=f"evaluate linear of {store}",
    )


def _classification(task: str, store: str, test: str | None) -> Callable[[Any], Any]:
    def job(settings: Any) -> Any:
        from pipelines.evaluate.classify import run

        return run(settings, task=task, store=store, test=test)

    return job


@evaluate.command("retrieval")
def evaluate_retrieval(
    store: StoreArgument,
    of: Annotated[str, typer.Option("--of", metavar="embeddings", help="Vectors that are compared.")] = "embeddings",
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Whether the nearest images have the same label: recall@k and mean average precision (mAP)."""

    def job(settings: Any) -> Any:
        from pipelines.evaluate.retrieval import run

        return run(settings, store=store, of=of)

    plan = f"evaluate retrieval of {store}"
    _run_job(job, cli_output.print_retrieval, config, overrides, dry_run=dry_run, as_json=as_json, reads_only=plan)


@evaluate.command("segmentation")
def evaluate_segmentation(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a co-segmentation that `dinoray cosegment` made.")],
    masks: Annotated[
        str, typer.Option("--masks", metavar="FOLDER", help="Annotated masks, named like the images; > 127 is inside.")
    ],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """The common foreground against annotated masks: Jaccard, precision and CorLoc."""

    def job(settings: Any) -> Any:
        from pipelines.evaluate.segmentation import run

        return run(settings, store=store, name=name, masks=masks)

    plan = f"evaluate the foreground of parts {name} of {store} with {masks}"
    show = cli_output.print_segmentation
    _run_job(job, show, config, overrides, dry_run=dry_run, as_json=as_json, reads_only=plan)


@evaluate.command("parts")
def evaluate_parts(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a co-segmentation that `dinoray cosegment` made.")],
    annotations: Annotated[
        str,
        typer.Option(
            "--annotations",
            metavar="FOLDER",
            help="Part labels, named like the images, or key points in the layout of PF-WILLOW or SPair-71k.",
        ),
    ],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Parts against part labels or key points: normalised mutual information (NMI) and adjusted Rand index (ARI)."""

    def job(settings: Any) -> Any:
        from pipelines.evaluate.parts import run

        return run(settings, store=store, name=name, annotations=annotations)

    plan = f"evaluate the parts {name} of {store} with {annotations}"
    _run_job(job, cli_output.print_parts, config, overrides, dry_run=dry_run, as_json=as_json, reads_only=plan)


@app.command()
def report(
    store: StoreArgument,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="Default: report.html in the store.")
    ] = None,
    sample: Annotated[int | None, typer.Option("--sample", min=1, help="How many images to show.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", metavar="ID|FILE", help="An image_id, or a file that lists some; repeatable."),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option("--query", metavar="SQL", help="Which images: SELECT image_id FROM images WHERE ... (DuckDB)."),
    ] = None,
    png: Annotated[str | None, typer.Option("--png", metavar="DIR", help="Also write the plots as PNG files.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """See it: photos with what was found in them, and where a patch occurs in all others, as one HTML file."""

    def job(settings: Any) -> Any:
        from pipelines.report import run

        return run(
            settings,
            store=store,
            output=output,
            sample=sample,
            images=images,
            query=query,
            png=png,
            dry_run=dry_run,
        )

    _run_job(job, cli_output.print_report, config, overrides, dry_run=dry_run, as_json=as_json)


@app.command()
def verify(
    store: StoreArgument,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Check that a store holds what it says: every image all its patches, files and log agreeing. Exit 1 if not."""

    def job(settings: Any) -> Any:
        from pipelines.upkeep.verify import run

        return run(settings, store=store)

    _run_job(
        job, cli_output.print_verify, config, overrides, dry_run=dry_run, as_json=as_json, reads_only=f"verify {store}"
    )


@app.command()
def compact(
    store: StoreArgument,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Merge the small files that many runs leave, and remove what no snapshot within compact.retention_hours needs."""

    def job(settings: Any) -> Any:
        from pipelines.upkeep.compact import run

        return run(settings, store=store, dry_run=dry_run)

    _run_job(job, cli_output.print_compact, config, overrides, dry_run=dry_run, as_json=as_json)


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="YAML: store, settings, jobs in order.")],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """The jobs of PIPELINE.yaml over one store, each only where there is something to do; for schedulers."""

    def job(settings: Any) -> Any:
        from pipelines.pipeline.job import run as run_pipeline
        from pipelines.settings.loading import load_settings
        from pipelines.settings.pipeline_file import read_pipeline

        asked = read_pipeline(pipeline, load_settings(config or (), overrides or ()))
        return run_pipeline(asked, dry_run=dry_run, tell=lambda line: print(line, file=sys.stderr, flush=True))

    _run_job(job, cli_output.print_pipeline, config, overrides, dry_run=dry_run, as_json=as_json)


@app.command()
def stats(
    store: StoreArgument,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """A store at a glance: rows, files, bytes, failures by reason, and its runs."""

    def job(settings: Any) -> Any:
        from pipelines.upkeep.stats import run

        return run(settings, store=store)

    _run_job(
        job, cli_output.print_stats, config, overrides, dry_run=dry_run, as_json=as_json, reads_only=f"read {store}"
    )


@app.command()
def settings(
    config: ConfigFiles = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    log_json: LogJson = False,
) -> None:
    """Every setting: its value after -c and --set, and what it does."""

    def job(loaded: Any) -> Any:
        return loaded

    def show(loaded: Any) -> None:
        for section in type(loaded).model_fields:
            print(f"\n{section}:")
            values = getattr(loaded, section)
            for key, about in type(values).model_fields.items():
                value = json.dumps(loaded.without_secrets()[section][key])
                print(f"  {key}: {value}\n      {about.description}")

    _run_job(job, show, config, overrides, as_json=as_json)


def main() -> None:
    """Entry point."""
    app()


def _complain(message: str, code: int, *, as_json: bool, said: str = "") -> None:
    """Say an error where it is looked for: on standard error, and with --json on standard output too."""
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    if json_log.active():
        json_log.failed(message, code)
    else:
        print(f"dinoray: {cli_output.printable(said or message)}", file=sys.stderr)


def _run_job(
    job: Callable[[Any], Any],
    show: Callable[[Any], None],
    files: list[Path] | None,
    overrides: list[str] | None,
    *,
    dry_run: bool = False,
    as_json: bool = False,
    reads_only: str = "",
) -> None:
    from pipelines.running.interrupts import interruptible
    from pipelines.settings.loading import load_config

    try:
        with interruptible():
            config = load_config(files or (), overrides or ())
            json_log.hide(config.storage.options)
            if dry_run and not as_json:
                import yaml

                print(yaml.safe_dump(config.without_secrets(), sort_keys=False), end="")
            if dry_run and reads_only:
                plan = {"would": reads_only}
                print(
                    json.dumps({"settings": config.without_secrets(), **plan}) if as_json else f"\nwould {reads_only}"
                )
                return
            result = job(config)
    except KeyboardInterrupt:
        _complain("interrupted", 130, as_json=as_json, said="interrupted.")
        raise typer.Exit(130) from None
    except Exception as error:
        from pipelines.storage.errors import explain_failed_storage

        told = explain_failed_storage(error) or error
        code = exit_code_of(told)
        if code is None:
            raise
        _complain(" ".join(str(told).split()), code, as_json=as_json)
        raise typer.Exit(code) from None
    content = result.as_dict() if hasattr(result, "as_dict") else result.without_secrets()
    for message in getattr(result, "messages", ()):
        if json_log.active():
            json_log.event("message", message, level=logging.WARNING)
        else:
            print(f"dinoray: {cli_output.printable(message)}", file=sys.stderr)
    json_log.finished(content)
    if as_json:
        if dry_run:
            content = {"settings": config.without_secrets(), **content}
        print(json.dumps(content, ensure_ascii=False))
    else:
        show(result)
    if code := getattr(result, "exit_code", 0):
        raise typer.Exit(code)
