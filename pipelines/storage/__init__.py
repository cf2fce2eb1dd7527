"""Paths, small files and credentials on any storage that fsspec knows: `from pipelines import storage`."""

from pipelines.storage.conditional import write_once as write_once
from pipelines.storage.errors import explain_failed_storage as explain_failed_storage
from pipelines.storage.errors import explain_write_error as explain_write_error
from pipelines.storage.errors import failed_storage as failed_storage
from pipelines.storage.errors import reaching as reaching
from pipelines.storage.errors import said as said
from pipelines.storage.files import DamagedJson as DamagedJson
from pipelines.storage.files import filesystem as filesystem
from pipelines.storage.files import join as join
from pipelines.storage.files import normalise as normalise
from pipelines.storage.files import partial_name as partial_name
from pipelines.storage.files import read_json as read_json
from pipelines.storage.files import sha256 as sha256
from pipelines.storage.files import write_bytes as write_bytes
from pipelines.storage.files import write_json as write_json
from pipelines.storage.filesystems import Options as Options
from pipelines.storage.filesystems import delta_options as delta_options
from pipelines.storage.filesystems import is_local as is_local
