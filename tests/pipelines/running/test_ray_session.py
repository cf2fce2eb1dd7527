"""Starting Ray, or not; one session for several jobs."""

from __future__ import annotations

import importlib.util
import socket
from typing import Any

import pytest

from pipelines.errors import JobError
from pipelines.running.ray_session import ray_session
from pipelines.settings.loading import load_config
from pipelines.settings.sections import RunSettings


def test_a_ray_that_does_not_start_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def too_slow(**_: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...\nmore")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", too_slow)
    with (
        pytest.raises(JobError, match=r"^A local Ray could not be started: The current node timed out .*less busy"),
        ray_session(load_config().run),
    ):
        pass


@pytest.mark.parametrize("address", ["local", "auto"])
def test_a_ray_that_fails_without_a_word(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def silent(**_: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", silent)
    with pytest.raises(JobError, match="ConnectionError"), ray_session(RunSettings(address=address)):
        pass


def test_the_jobs_of_a_pipeline_share_a_session_and_its_metrics_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is taken by then: by the session that is shared."""
    import ray

    started: list[dict[str, Any]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(started))
    monkeypatch.setattr(ray, "init", lambda **given: started.append(given))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 6.0}}])
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    run = load_config([], [f"run.metrics_port={port}", "run.address=local"]).run
    with ray_session(run) as resources, socket.socket() as served:
        served.bind(("", port))
        served.listen()
        with ray_session(run) as shared:
            assert shared == resources
    assert [given["_metrics_export_port"] for given in started] == [port]
