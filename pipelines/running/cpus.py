"""How many CPUs there really are."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = _CGROUP) -> int:
    """CPUs that this process may use, at least 1.

    os.cpu_count() counts those of the machine, of which a container or a batch scheduler may give only a few.
    """
    # macOS does not have it
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cpus, math.ceil(_quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """CPU seconds a second that the control group allows: version 2, then version 1."""
    # no limit is the word `max`, which is not a number
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return float(quota) / float(period)
    with suppress(OSError, ValueError):
        quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
        if int(quota) > 0:
            return int(quota) / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    return float(os.cpu_count() or 1)
