"""INPUT of every kind: listed as one table, fetched as bytes. Knows nothing of features, stores or Ray."""

from pipelines.errors import InputError
from pipelines.sources.fetching import Fetched, fetch
from pipelines.sources.inputs import list_images
from pipelines.sources.listing import LISTING_SCHEMA, BrokenContainer, Listing

__all__ = ["LISTING_SCHEMA", "BrokenContainer", "Fetched", "InputError", "Listing", "fetch", "list_images"]
