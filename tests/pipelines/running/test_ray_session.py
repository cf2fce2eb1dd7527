"""Starting Ray, or not; one session for several jobs."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from pipelines.errors import JobError
from pipelines.running.ray_session import explain_ray_error, ray_session
from pipelines.settings.loading import load_config
from pipelines.settings.sections import RunSettings
from pipelines.store.parquet import DamagedFile


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


ADDRESSES_LISTENED_ON = """
import json, sys
import psutil
from pipelines.running.ray_session import ray_session
from pipelines.settings.loading import load_config

with ray_session(load_config([], ["run.address=local", "run.object_store_gb=0.1"]).run):
    import ray

    ray.get([ray.remote(lambda: None).remote() for _ in range(2)])
    us = psutil.Process()
    processes = [us, *us.children(recursive=True)]
    listening = [
        (process.name(), connection.laddr.ip)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
print(json.dumps(listening))
"""


def test_a_local_ray_listens_on_loopback_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADDRESSES_LISTENED_ON], capture_output=True, text=True, timeout=120, check=True
    )
    listening = json.loads(done.stdout)
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}, "or nothing was looked at"
    addresses = {ipaddress.ip_address(address.removeprefix("::ffff:")) for _, address in listening}
    assert all(address.is_loopback for address in addresses), listening


def test_a_cluster_is_joined_at_the_machines_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same process, after a local Ray; and metrics are served to other machines."""
    import ray
    import ray._private.ray_constants as constants

    started: list[tuple[Any, Any, bool]] = []

    def init(address: str, _metrics_export_port: int | None = None, **_: Any) -> None:
        started.append((address, _metrics_export_port, constants.ENABLE_RAY_CLUSTER))

    monkeypatch.setattr(constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 6.0}}])
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    for run in (
        RunSettings(address="local"),
        RunSettings(address="auto"),
        RunSettings(address="local", metrics_port=port),
    ):
        with ray_session(run):
            pass
    assert started == [("local", None, False), ("auto", None, True), ("local", port, True)]


def test_a_mistake_that_a_task_met_before_the_one_that_needs_it_is_a_sentence() -> None:
    """A task whose argument failed has an error whose cause is of both kinds: Ray's own, and the mistake's."""
    mistake = DamagedFile("/store/patches/part-x.parquet", "it is cut short")
    reading = RayTaskError("load_images", "Traceback of load_images", mistake).as_instanceof_cause()
    matching = RayTaskError("match_pairs", "Traceback of match_pairs", reading).as_instanceof_cause()
    for error in (reading, matching):
        explained = explain_ray_error(error, "the matching")
        assert type(explained) is DamagedFile and str(explained) == str(mistake)
