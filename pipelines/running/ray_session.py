"""Starting or joining Ray: quiet, without telemetry or dashboard, sized for the machine."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Iterator

from dino_ops.errors import ModelError
from pipelines.errors import DinorayError, JobError, RequestError
from pipelines.running.cpus import available_cpus
from pipelines.running.layout import LARGEST_NODE_CPUS_KEY, LARGEST_NODE_GPUS_KEY
from pipelines.settings.sections import RunSettings
from pipelines.storage.errors import said

CONNECT_SECONDS = 5
RAY_METRICS_PACKAGES = ("grpc", "opencensus", "opentelemetry", "prometheus_client")
# Ray waits forever when actor pools leave no CPU for anything else.
RAY_SPARE_CPUS = 2


@contextlib.contextmanager
def ray_session(run: RunSettings) -> Iterator[dict[str, float]]:
    """Ray for the length of a job; yields the cluster's resources. A session that was there before is left running.

    The cluster is run.address, else RAY_ADDRESS (which `ray job submit` sets), else a local one of this job's own.

    Raises:
        RequestError: an address that Ray Data cannot work through.
        JobError: the cluster cannot be reached.
    """
    # the jobs of a pipeline share its session
    if _Open.resources is not None:
        yield dict(_Open.resources)
        return
    address = run.address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    _check_metrics_port(run.metrics_port, address)
    # read when Ray is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # CPU workers keep seeing the GPUs that they saw
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.data

    # after the import, which sets them
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ours = not ray.is_initialized()
    with native_stderr_hidden():
        yield from _session(run, address, ours)


class _Open:
    """The resources of the session that is open in this process, if one is."""

    resources: dict[str, float] | None = None


def _check_address(address: str) -> None:
    """Find out within seconds what Ray itself takes minutes to report."""
    if address.startswith("ray://"):
        raise RequestError(
            f"The Ray cluster's address is {address}, but Ray Data does not work through Ray's client: run dinoray on "
            "a node of the cluster with run.address=auto, or send it there with `ray job submit`."
        )
    # `auto` and `local` have no port
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise JobError(
            f"The Ray cluster at {address} could not be reached ({error}): give the address of its head node, such as "
            "10.0.0.1:6379, or `auto` on a node of it."
        ) from None


def _check_metrics_port(port: int | None, address: str) -> None:
    """Ray would start all the same, and serve nothing."""
    if port is None:
        return
    if address != "local":
        raise RequestError(
            f"run.metrics_port is {port}, but the Ray cluster at {address} serves metrics at the port that it was "
            "started with (ray start --metrics-export-port): leave run.metrics_port out."
        )
    if not all(importlib.util.find_spec(name) for name in RAY_METRICS_PACKAGES):
        raise RequestError(
            f"run.metrics_port is {port}, but the packages of Ray's metrics agent are not installed: "
            'pip install "dinoray[metrics]".'
        )
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("", port))
        except OSError as error:
            raise RequestError(f"run.metrics_port {port} cannot be used ({error}): give another port.") from None


def _session(run: RunSettings, address: str, ours: bool) -> Iterator[dict[str, float]]:
    import ray

    if ours:
        try:
            if address != "local":
                ray.init(address=address, logging_level="ERROR", log_to_driver=False)
            else:
                # what Ray serves metrics to is elsewhere
                with _on_loopback() if run.metrics_port is None else contextlib.nullcontext():
                    # without an address Ray joins a cluster that somebody started on this machine
                    ray.init(
                        address="local",
                        num_cpus=available_cpus() + RAY_SPARE_CPUS,
                        include_dashboard=False,
                        object_store_memory=int(run.object_store_gb * 2**30) if run.object_store_gb else None,
                        logging_level="ERROR",
                        log_to_driver=False,
                        _metrics_export_port=run.metrics_port,
                    )
        # Ray raises Exception itself where the machine was too busy for its processes to start in time
        except Exception as error:
            reason = said(error)
            if address == "local":
                raise JobError(
                    f"A local Ray could not be started: {reason}. Give it a machine that is less busy, or more memory, "
                    "and run the same command again."
                ) from None
            raise JobError(
                f"The Ray cluster at {address} could not be reached ({reason}): check run.address, that Ray's version "
                f"is {ray.__version__} there too, and whether it asks for a token (RAY_AUTH_MODE=token)."
            ) from None
    try:
        resources = _cluster_resources(spare_cpus=RAY_SPARE_CPUS if address == "local" and ours else 0)
        _Open.resources = resources
        yield resources
    finally:
        _Open.resources = None
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Within: a Ray that starts listens on the loopback interface only, as it does on Windows and macOS.

    `ray.init(_node_ip_address="127.0.0.1")` would take the machine's own address instead. The variable
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER decides the same, but only for a Ray that is not imported yet, and for clusters
    that are joined later too.
    """
    import ray._private.ray_constants as constants

    before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _cluster_resources(spare_cpus: int) -> dict[str, float]:
    """What the cluster has in all, and its largest node has: a worker runs on one. spare_cpus: kept for Ray itself."""
    import ray

    resources = dict(ray.cluster_resources())
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    resources["CPU"] = max(1.0, resources.get("CPU", 1.0) - spare_cpus)
    resources[LARGEST_NODE_CPUS_KEY] = max(1.0, max((node.get("CPU", 0.0) for node in nodes), default=1.0) - spare_cpus)
    resources[LARGEST_NODE_GPUS_KEY] = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    return resources


def explain_ray_error(error: BaseException, work: str) -> Exception:
    """The user's mistake inside a worker's error, or a JobError naming what Ray said."""
    from ray.exceptions import RayTaskError

    cause: BaseException | None = error
    while cause is not None:
        # Ray's own error is of the class of what it wraps, too, and says a traceback
        if isinstance(cause, ModelError | DinorayError) and not isinstance(cause, RayTaskError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return JobError(f"Ray could not run {work}: {lines[-1].strip() if lines else type(error).__name__}")


@contextlib.contextmanager
def native_stderr_hidden() -> Iterator[None]:
    """What Ray's C++ code writes to the console goes nowhere (it is in Ray's own logs); Python's stderr stays."""
    sys.stderr.flush()
    shown, python_stderr = os.dup(2), sys.stderr
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    if python_stderr is sys.__stderr__:
        sys.stderr = os.fdopen(shown, "w", buffering=1, closefd=False)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = python_stderr
        os.dup2(shown, 2)
        os.close(shown)
