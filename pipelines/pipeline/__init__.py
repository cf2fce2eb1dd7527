from pipelines.pipeline.job import Result as Result
from pipelines.pipeline.job import run as run
