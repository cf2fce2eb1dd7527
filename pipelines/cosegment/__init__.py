from pipelines.cosegment.job import Result as Result
from pipelines.cosegment.job import run as run
