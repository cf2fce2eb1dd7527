"""A Ray that does not start is a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.config import load_config
from pipelines.errors import JobError
from pipelines.ray_session import ray_session


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
