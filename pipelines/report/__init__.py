"""report: one HTML file that shows what is in a store. `job.py` says in which order it is made."""

from pipelines.report.job import Result as Result
from pipelines.report.job import run as run
