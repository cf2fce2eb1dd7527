"""Prometheus metrics: what is counted, what a wrong port is told, and the text of Ray's real endpoint."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL_MODEL, settings

from pipelines.errors import RequestError
from pipelines.running import metrics
from pipelines.running.metrics import BusyDevice, JobMetrics
from pipelines.running.ray_session import RAY_METRICS_PACKAGES, ray_session

EXTRACT_AND_READ = """
import json, sys, time, urllib.request
from pipelines import correspond, cosegment, extract
from pipelines.settings.loading import load_config
from pipelines.running.ray_session import ray_session

folder, store, port, *overrides = sys.argv[1:]
config = load_config([], [*overrides, f"run.metrics_port={port}"])
with ray_session(config.run):
    result = extract.run(config, input=folder, store=store)
    pairs = correspond.run(config, store=store, name="all", pairs="all")
    parts = cosegment.run(config, store=store, name="parts", sets="label")
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + 60
    text = ""
    while time.monotonic() < until and text.count('stage="commit"') < 3:
        time.sleep(1)
        text = no_proxy.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
results = {"extract": result.as_dict(), "correspond": pairs.as_dict(), "cosegment": parts.as_dict()}
print(json.dumps({"results": results, "text": text}))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Counted:
    """Ray's counters and gauges, whose values can be read."""

    values: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] = ()) -> None:
        assert description
        self.name, self.tag_keys, self.tags = name, tag_keys, dict[str, str]()

    def set_default_tags(self, tags: dict[str, str]) -> Counted:
        self.tags = tags
        return self

    def _series(self, tags: dict[str, str]) -> tuple[str, ...]:
        given = self.tags | tags
        assert given.keys() == {*self.tag_keys}
        return (self.name, *(given[key] for key in self.tag_keys))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # as Ray does
        self.values[self._series(tags)] += value

    def set(self, value: float) -> None:
        self.values[self._series({})] = value


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    import ray.util.metrics

    values: dict[tuple[str, ...], float] = defaultdict(float)
    monkeypatch.setattr(Counted, "values", values, raising=False)
    monkeypatch.setattr(ray.util.metrics, "Counter", Counted)
    monkeypatch.setattr(ray.util.metrics, "Gauge", Counted)
    return values


def test_counts_add_up_by_stage_and_reason(counted: dict[tuple[str, ...], float]) -> None:
    job = JobMetrics("extract")
    for _ in range(2):
        job.spent({"fetch": 0.5, "model": 2.0, "write": 0.0})
        job.read(1000)
        job.committed(8, 500, {("decode", "ImageError"): 1})
    job.committed(0, 0, {})
    assert counted == {
        ("dinoray_images_total", "extract"): 16,
        ("dinoray_images_failed_total", "extract", "decode", "ImageError"): 2,
        ("dinoray_read_bytes_total", "extract"): 2000,
        ("dinoray_written_bytes_total", "extract"): 1000,
        ("dinoray_stage_seconds_total", "extract", "fetch"): 1.0,
        ("dinoray_stage_seconds_total", "extract", "model"): 4.0,
    }


def test_a_device_is_busy_while_its_model_computes(
    counted: dict[tuple[str, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    device = BusyDevice()
    for wall, model, ratio in [(4, 2, 0.5), (12, 10, 0.75), (8, 2, 0.25)]:  # the last one in a window of its own
        now += wall
        device.computed(model)
        assert counted[("dinoray_device_busy_ratio",)] == ratio


def test_without_the_extra_a_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r'pip install "dinoray\[metrics\]"'), ray_session(_with_port(9999)):
        pass


def test_a_taken_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(RequestError, match=f"run.metrics_port {port} cannot be used"),
            ray_session(_with_port(port)),
        ):
            pass


def test_a_cluster_has_a_port_of_its_own() -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        wrong = settings("run.metrics_port=9999", f"run.address={address}").run
        with pytest.raises(RequestError, match="--metrics-export-port"), ray_session(wrong):
            pass


def _with_port(port: int) -> Any:
    return settings(f"run.metrics_port={port}", "run.address=local").run


@pytest.mark.slow
def test_the_endpoint_serves_what_the_report_says(photos: Callable[..., Path], tmp_path: Path) -> None:
    for name in RAY_METRICS_PACKAGES:
        pytest.importorskip(name, reason='needs pip install "dinoray[metrics]"')
    from prometheus_client.parser import text_string_to_metric_families

    folder, store = photos(6), tmp_path / "store"
    (folder / "broken.jpg").write_bytes(b"no image")
    command = [sys.executable, "-c", EXTRACT_AND_READ, str(folder), str(store), str(free_port()), *SMALL_MODEL]
    done = subprocess.run(
        [*command, "run.max_failed_fraction=0.5"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "RAY_metrics_report_interval_ms": "1000"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout.splitlines()[-1])
    result, pairs, parts = (content["results"][job] for job in ("extract", "correspond", "cosegment"))
    samples = [sample for family in text_string_to_metric_families(content["text"]) for sample in family.samples]
    ours = [sample for sample in samples if sample.name.startswith("ray_dinoray_")]
    assert ours and not any(str(tmp_path) in value for sample in ours for value in sample.labels.values())

    def value(name: str, **labels: str) -> float:
        found = [s.value for s in ours if s.name == f"ray_dinoray_{name}" and labels.items() <= s.labels.items()]
        assert len(found) == 1, (name, found)
        return float(found[0])

    assert value("images_total", command="extract") == result["extracted"] == 6
    assert result["failures_by_reason"] == {"decode: ImageError": 1}
    assert value("images_failed_total", stage="decode", error="ImageError") == 1
    assert value("pairs_total", command="correspond") == pairs["matched"] > 0
    assert value("images_total", command="cosegment") == parts["segmented"] == 6
    for command, of_job in content["results"].items():
        assert value("read_bytes_total", command=command) == of_job["bytes_read"] > 0
        assert value("written_bytes_total", command=command) == of_job["bytes_written"] > 0
        stages = {sample.labels.get("stage") for sample in ours if sample.labels.get("command") == command}
        assert "commit" in stages
    for stage in ("fetch", "decode", "model", "write", "commit"):
        found = value("stage_seconds_total", command="extract", stage=stage)
        assert found == pytest.approx(result["seconds"][stage], abs=1e-3)
