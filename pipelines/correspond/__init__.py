from pipelines.correspond.job import Result as Result
from pipelines.correspond.job import run as run
