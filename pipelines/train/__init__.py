from pipelines.train.job import Result as Result
from pipelines.train.job import run as run
