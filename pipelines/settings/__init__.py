"""Every setting (sections), how settings are read (loading), and pipeline files."""

from pipelines.settings.loading import load_config as load_config
from pipelines.settings.loading import load_settings as load_settings
from pipelines.settings.loading import make_config as make_config
from pipelines.settings.sections import Config as Config
