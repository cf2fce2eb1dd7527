from pipelines.index.job import Result as Result
from pipelines.index.job import run as run
