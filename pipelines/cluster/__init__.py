from pipelines.cluster.job import Result as Result
from pipelines.cluster.job import run as run
