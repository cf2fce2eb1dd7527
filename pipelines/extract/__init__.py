from pipelines.extract.job import Result as Result
from pipelines.extract.job import run as run
