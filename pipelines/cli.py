"""The command `dinoray`. Parses, loads the configuration, calls the job, prints where the results are.

Commands and their arguments come from pipelines/jobs.py. Loads neither torch nor Ray nor pyarrow: jobs are imported
when they are called, so that --help is instant.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from importlib import metadata
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipelines import cli_output
from pipelines.errors import RequestError, exit_code_of
from pipelines.jobs import JOBS, Argument, Job
from pipelines.running import json_log
from pipelines.running.terminal import say, say_json, warn
from pipelines.storage.secrets import hidden, hidden_in

LOG_JSON = "--log-json"


@contextlib.contextmanager
def _mistakes_without_secrets() -> Iterator[None]:
    """Within: what is said of arguments that cannot be parsed, which quotes them, shows no secret."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and isinstance(said := getattr(error, "message", None), str):
            vars(error)["message"] = hidden(said)
        raise


class Commands(TyperGroup):
    """All commands. With --log-json standard error is lines of JSON, whatever happens."""

    def make_context(self, *given: Any, **named: Any) -> Any:
        with _mistakes_without_secrets():
            return super().make_context(*given, **named)

    def invoke(self, ctx: Any) -> Any:
        with _mistakes_without_secrets():
            return super().invoke(ctx)

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
            # arguments that cannot be parsed
            code = int(getattr(error, "exit_code", 2))
            _complain(error.format_message(), code, as_json="--json" in arguments)
            return code


class TaskGroup(TyperGroup):
    """Commands that are tasks: an unknown one is answered with those there are."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            message = f"There is no task {args[0]!r} to evaluate: choose {' or '.join(self.commands)}."
            _complain(message, 2, as_json="--json" in args)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    name="dinoray",
    help="Turn image datasets into tables of DINO-ViT features, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate = typer.Typer(cls=TaskGroup, no_args_is_help=True)


@dataclass(frozen=True)
class Shared:
    """What every command is given besides its own arguments."""

    config: list[Path]
    overrides: list[str]
    dry_run: bool
    as_json: bool


_SHARED_OPTIONS: dict[str, tuple[Any, Any]] = {
    "config": (
        Annotated[list[Path] | None, typer.Option("-c", "--config", help="YAML settings; later files win.")],
        None,
    ),
    "overrides": (
        Annotated[list[str] | None, typer.Option("--set", help="section.key=value; wins over files.")],
        None,
    ),
    "dry_run": (
        Annotated[bool, typer.Option("--dry-run", help="Print the effective configuration and the plan; do nothing.")],
        False,
    ),
    "as_json": (
        Annotated[bool, typer.Option("--json", help="One JSON object on standard output; the rest on standard error.")],
        False,
    ),
    # `Commands` sees to it, so that what goes wrong before a command is called is a line too
    "log_json": (
        Annotated[bool, typer.Option(LOG_JSON, help="Standard error as lines of JSON: progress, messages, errors.")],
        False,
    ),
}


def with_shared_options(command: Callable[..., None], *, without: Sequence[str] = ()) -> Callable[..., None]:
    """A command that takes the shared options too, which it gets together as its first argument.

    without: names of shared options that it has no use for.
    """

    @wraps(command)
    def call(**given: Any) -> None:
        taken = {name: given.pop(name, default) for name, (_, default) in _SHARED_OPTIONS.items()}
        shared = Shared(taken["config"] or [], taken["overrides"] or [], taken["dry_run"], taken["as_json"])
        command(shared, **given)

    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    shared = [
        _parameter(name, annotation, default)
        for name, (annotation, default) in _SHARED_OPTIONS.items()
        if name not in without
    ]
    return _with_parameters(call, [*own, *shared])


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_parameters(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> Callable[..., Any]:
    """The function with a signature that says which keyword arguments it takes; typer reads options from it."""
    named = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    vars(function)["__signature__"] = inspect.Signature(named)
    function.__annotations__ = {one.name: one.annotation for one in named}
    return function


def _command_of(job: Job) -> Callable[..., None]:
    """The command of a job, with the arguments that the table of jobs lists."""

    def command(shared: Shared, **given: Any) -> None:
        from pipelines.settings.arguments import split_arguments

        try:
            arguments, as_settings = split_arguments(job, given)
        except RequestError as error:
            _complain(str(error), error.exit_code, as_json=shared.as_json)
            raise typer.Exit(error.exit_code) from None

        def call(config: Any) -> Any:
            return job.run(config, **arguments, **({"dry_run": shared.dry_run} if job.plans else {}))

        plan = "" if job.plans else " ".join([job.verb or job.command, *_words(job, arguments)])
        _run(call, cli_output.printer_of(job.command), shared, as_settings, reads_only=plan)

    command.__name__, command.__doc__ = job.command.rpartition(" ")[2], job.help
    own = [_parameter(one.name, _annotation(one), _default(one)) for one in job.all_arguments]
    _with_parameters(command, [_parameter("shared", Shared), *own])
    return with_shared_options(command)


def _words(job: Job, arguments: Mapping[str, Any]) -> list[str]:
    """Arguments as they stand on the command line; those that are as they are by default are left out."""
    words: list[str] = []
    for name, value in arguments.items():
        argument = job.parameters[name]
        if argument.position:
            words.append(value)
        elif value != argument.default:
            option = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, list) else [value]
            words += [word for one in values for word in ([option] if one is True else [option, f"{one}"])]
    return words


def _annotation(argument: Argument) -> Any:
    if argument.position:
        return Annotated[argument.kind, typer.Argument(metavar=argument.metavar, help=argument.help)]
    kind: Any = GenericAlias(list, (argument.kind,)) if argument.many else argument.kind
    optional = kind if argument.needed or argument.default is not None else kind | None
    names = [*([argument.short] if argument.short else []), f"--{argument.name.replace('_', '-')}"]
    return Annotated[optional, typer.Option(*names, metavar=argument.metavar, help=argument.help, min=argument.least)]


def _default(argument: Argument) -> Any:
    return inspect.Parameter.empty if argument.position or argument.needed else argument.default


def _add_commands() -> None:
    """Every job as a command, in the order of the table; tasks of evaluate as commands of their own group."""
    for job in JOBS.values():
        group, _, task = job.command.rpartition(" ")
        (evaluate if group else app).command(task)(_command_of(job))
        if group and not any(one.name == group for one in app.registered_groups):
            help = "How good the features of a store are: dinoray evaluate TASK STORE."
            app.add_typer(evaluate, name=group, help=help)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"dinoray {metadata.version('dinoray')}")
        raise typer.Exit


@app.callback()
def dinoray(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Turn image datasets into tables of DINO-ViT features, on a laptop or a Ray cluster."""


_add_commands()


@app.command()
@with_shared_options
def run(
    shared: Shared,
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="YAML: store, settings, jobs in order.")],
) -> None:
    """The jobs of PIPELINE.yaml over one store, each only where there is something to do; for schedulers."""

    def call(_: Any) -> Any:
        from pipelines.pipeline import run as run_pipeline
        from pipelines.settings.loading import load_settings
        from pipelines.settings.pipeline_file import read_pipeline

        asked = read_pipeline(pipeline, load_settings(shared.config, shared.overrides))
        return run_pipeline(asked, dry_run=shared.dry_run, tell=partial(say, file=sys.stderr))

    _run(call, cli_output.print_run, shared)


def settings(shared: Shared) -> None:
    """Every setting: its value after -c and --set, and what it does."""
    _run(lambda config: config, cli_output.print_settings, shared)


app.command()(with_shared_options(settings, without=["dry_run"]))


def main() -> None:
    """Entry point."""
    app()


def _complain(message: str, code: int, *, as_json: bool, said: str = "") -> None:
    """Say an error where it is looked for: on standard error, and with --json on standard output too."""
    if as_json:
        say_json({"error": message, "exit_code": code})
    if json_log.active():
        json_log.failed(message, code)
    else:
        warn(said or message)


def _run(
    job: Callable[[Any], Any],
    show: Callable[[Any], None],
    shared: Shared,
    as_settings: Mapping[str, Any] | None = None,
    *,
    reads_only: str = "",
) -> None:
    """Load the settings, call the job, and print its result or one sentence for what went wrong.

    as_settings: of arguments that stand for settings. reads_only: what a job would do that has no plan of its own.
    """
    from pipelines.running.interrupts import interruptible
    from pipelines.settings.loading import load_config

    try:
        with interruptible():
            config = load_config(shared.config, shared.overrides, as_settings)
            if shared.dry_run and not shared.as_json:
                import yaml

                say(yaml.safe_dump(config.without_secrets(), sort_keys=False), end="")
            if shared.dry_run and reads_only:
                if shared.as_json:
                    say_json({"settings": config.without_secrets(), "would": reads_only})
                else:
                    say(f"\nwould {reads_only}")
                return
            result = job(config)
    except KeyboardInterrupt:
        _complain("interrupted", 130, as_json=shared.as_json, said="interrupted.")
        raise typer.Exit(130) from None
    except Exception as error:
        from pipelines.storage.errors import explain_failed_storage

        told = explain_failed_storage(error) or error
        code = exit_code_of(told)
        if code is None:
            raise
        _complain(" ".join(str(told).split()), code, as_json=shared.as_json)
        raise typer.Exit(code) from None
    content = result.as_dict() if hasattr(result, "as_dict") else result.without_secrets()
    for message in getattr(result, "messages", ()):
        if json_log.active():
            json_log.event("message", message, level=logging.WARNING)
        else:
            warn(message)
    json_log.finished(content)
    if shared.as_json:
        if shared.dry_run:
            content = {"settings": config.without_secrets(), **content}
        say_json(content)
    # a job that only reads has nothing to show when it was interrupted
    elif not (reads_only and result.status == "interrupted"):
        show(hidden_in(result))
    if code := getattr(result, "exit_code", 0):
        raise typer.Exit(code)
