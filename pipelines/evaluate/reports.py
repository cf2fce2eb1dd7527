"""The run report of an evaluation."""

from __future__ import annotations

from typing import Any

from pipelines.errors import JobError
from pipelines.running.reports import RunReport


def write_report(report: RunReport, result: dict[str, Any]) -> list[str]:
    """Finish the report of an evaluation that is done. Returns messages where it could not be written.

    Other people's stores can often only be read, and the figures are worth having all the same.
    """
    try:
        report.finish("done", result=result)
    except (OSError, JobError) as error:
        return [f"the run report could not be written ({error})."]
    return []
