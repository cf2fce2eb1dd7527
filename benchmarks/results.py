"""The table of a benchmark: printed, and appended to results.md with the machine it was measured on."""

from __future__ import annotations

import datetime as dt
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.running.cpus import available_cpus

FILE = Path(__file__).with_name("results.md")


@dataclass(frozen=True)
class Row:
    """A measured ratio, the bar it should reach (">= 0.80", "<= 1.2", or "" for none), and the figures behind it."""

    what: str
    value: float
    bar: str
    figures: str

    @property
    def reached(self) -> str:
        if not self.bar:
            return ""
        sign, limit = self.bar.split()
        return "yes" if (self.value >= float(limit) if sign == ">=" else self.value <= float(limit)) else "NO"


def report(title: str, rows: list[Row]) -> None:
    """Print the table and append it to results.md."""
    lines = [
        f"## {title}, {dt.date.today().isoformat()}",
        "",
        f"{machine()}; Python {platform.python_version()}, torch {torch.__version__}",
        "",
        "| measure | value | bar | reached | figures |",
        "|---|---|---|---|---|",
        *(f"| {row.what} | {row.value:.2f} | {row.bar} | {row.reached} | {row.figures} |" for row in rows),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if not FILE.exists():
        FILE.write_text(
            "# Measured\n\nWhat `make bench` printed, newest last. Machines are shared and noisy: ratios hold.\n"
        )
    with FILE.open("a") as file:
        file.write("\n" + text)


def machine() -> str:
    """Processor and cores; the GPU where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    named = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    processor = named[0].partition(": ")[2] if named else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {available_cpus()} cores{gpu}"
