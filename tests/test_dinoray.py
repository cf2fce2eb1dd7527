"""`import dinoray`: the public door, light to open, with every job as a function."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pytest
from repository import ROOT

import dinoray
from pipelines.errors import DinorayError, InputError, JobError, RequestError, StorageError
from pipelines.jobs import JOBS, Job
from pipelines.settings.loading import nested


def test_importing_it_loads_no_library_that_takes_time() -> None:
    heavy = ("torch", "timm", "ray", "pyarrow", "deltalake", "faiss", "sklearn", "cv2")
    found = subprocess.run(
        [sys.executable, "-c", f"import dinoray, sys; print([name for name in {heavy} if name in sys.modules])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "[]"


def test_it_offers_what_it_names() -> None:
    for name in dinoray.__all__:
        assert getattr(dinoray, name) is not None and name in dir(dinoray)
    assert dinoray.__version__ == metadata.version("dinoray")
    assert (dinoray.DinorayError, dinoray.RequestError, dinoray.JobError) == (DinorayError, RequestError, JobError)
    assert (dinoray.InputError, dinoray.StorageError) == (InputError, StorageError)
    misspelt = "clustr"
    with pytest.raises(AttributeError, match="no attribute 'clustr'"):
        getattr(dinoray, misspelt)


@pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
def test_the_arguments_in_the_table_are_the_parameters_of_the_job(job: Job) -> None:
    """What jobs.py names is what the function takes, in either direction, with the same defaults."""
    parameters = dict(inspect.signature(job.run).parameters)
    assert parameters.pop("config").kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert (parameters.pop("dry_run", None) is not None) == job.plans
    assert parameters.keys() == job.parameters.keys()
    for name, argument in job.parameters.items():
        needed = parameters[name].default is inspect.Parameter.empty
        assert needed == (argument.position or argument.needed), name
        assert needed or parameters[name].default == argument.default, name


@pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
def test_signatures_for_type_checkers_are_those_of_the_functions(job: Job) -> None:
    name = job.command.replace(" ", "_")
    stubs = {
        node.name: node
        for node in ast.parse((ROOT / "dinoray" / "__init__.pyi").read_text()).body
        if hasattr(node, "name")
    }
    arguments = stubs[name].args
    expected = inspect.signature(getattr(dinoray, name)).parameters.values()
    first = [one.name for one in expected if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    named = [one.name for one in expected if one.kind is inspect.Parameter.KEYWORD_ONLY]
    assert ([one.arg for one in arguments.args], [one.arg for one in arguments.kwonlyargs]) == (first, named)


def test_a_function_gets_settings_files_and_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments win over settings, and settings over files, as on the command line."""
    import pipelines.cluster

    seen: dict[str, Any] = {}

    def run(config: Any, **arguments: Any) -> Any:
        seen.update(arguments, config=config)
        return type("Result", (), {"status": "done"})()

    monkeypatch.setattr(pipelines.cluster, "run", run)
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster: {k: 7, levels: 2, seed: 3}")
    given = {"cluster.levels": 1, "cluster": {"seed": 4}}
    dinoray.cluster("features", "words", k=9, settings=given, config=file, dry_run=True)
    assert (seen["store"], seen["name"], seen["dry_run"], seen["update"]) == ("features", "words", True, False)
    assert "k" not in seen and "of" not in seen
    assert (seen["config"].cluster.k, seen["config"].cluster.levels, seen["config"].cluster.seed) == (9, 1, 4)


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(dinoray.RequestError, match="There is no store"):
        dinoray.stats(str(tmp_path / "nowhere"))
    with pytest.raises(dinoray.RequestError, match=r"did you mean cluster\.k"):
        dinoray.cluster("features", "words", settings={"cluster.kk": 1})
    with pytest.raises(TypeError, match="missing a required argument: 'name'"):
        dinoray.cluster("features")
    with pytest.raises(dinoray.RequestError, match=r"does not exist"):
        dinoray.run(tmp_path / "none.yaml")
    with pytest.raises(dinoray.RequestError, match="a name is text"):
        nested(cast(dict[str, Any], {3: 4}))


def test_arguments_are_checked_as_on_the_command_line(tmp_path: Path) -> None:
    for given in ({"limit": -1}, {"limit": "few"}):
        with pytest.raises(dinoray.RequestError, match="limit is"):
            dinoray.extract("photos", "features", **given)
    with pytest.raises(dinoray.RequestError, match="There is no store"):
        dinoray.verify(tmp_path / "nowhere")


def test_an_interruption_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the job was about to record it or not, and of a pipeline too."""
    import pipelines.index
    import pipelines.pipeline.job

    def stopped(*_: Any, **__: Any) -> Any:
        return type("Result", (), {"status": "interrupted"})()

    def stopping(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for run in (stopped, stopping):
        monkeypatch.setattr(pipelines.index, "run", run)
        with pytest.raises(KeyboardInterrupt):
            dinoray.index("features", "images")
    monkeypatch.setattr(pipelines.pipeline.job, "_plan_job", stopping)
    (tmp_path / "nightly.yaml").write_text(f"store: {tmp_path}/store\njobs: [verify]\n")
    with pytest.raises(KeyboardInterrupt):
        dinoray.run(tmp_path / "nightly.yaml", dry_run=True)


def test_storage_that_does_not_answer_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the command line, also where a job has not begun to record how it ends."""
    import pipelines.index

    class Unreachable(Exception):
        __module__ = "botocore.exceptions"

    def lost(*_: Any, **__: Any) -> Any:
        raise Unreachable("no route")

    monkeypatch.setattr(pipelines.index, "run", lost)
    with pytest.raises(dinoray.JobError, match="could not be reached, or stopped answering: no route"):
        dinoray.index("features", "images")
