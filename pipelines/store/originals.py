"""The bytes of images that a store names by uri: of files, and of members of tars and rows of Parquet files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sources import LISTING_SCHEMA, InputError, fetch, list_images

# as pipelines.sources.tars and parquet_images write them
_INSIDE_A_CONTAINER = re.compile(r"(.+?\.tar)/.+|(.+\.parquet)#\d+", re.IGNORECASE | re.DOTALL)
ATTEMPTS = 2
CONTAINERS_AT_ONCE = 8


def stored_images(uris: Iterable[str], storage_options: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The bytes of each image that can still be read, by its uri."""
    rows = locate(uris, storage_options)
    fetched = fetch(rows, storage_options=storage_options, attempts=ATTEMPTS)
    return {uri: one.data for uri, one in zip(rows["uri"].to_pylist(), fetched, strict=True) if one.data is not None}


def locate(uris: Iterable[str], storage_options: dict[str, Any] | None = None) -> pa.Table:
    """Where the bytes of each image are, as `fetch` takes it; a container is listed once.

    An image that its container no longer has is missing, as are all of a container that cannot be listed.
    """
    alone, inside = [], defaultdict(list)
    for uri in dict.fromkeys(uris):
        found = _INSIDE_A_CONTAINER.fullmatch(uri)
        if found:
            inside[found[1] or found[2]].append(uri)
        elif uri:
            alone.append({"uri": uri, "source_size": -1, "source_version": ""})

    def members(container: str) -> pa.Table:
        try:
            rows = list_images(container, storage_options=storage_options).table
        except InputError:
            return LISTING_SCHEMA.empty_table()
        return rows.filter(pc.is_in(rows["uri"], value_set=pa.array(inside[container])))

    with ThreadPoolExecutor(CONTAINERS_AT_ONCE) as pool:
        listed = list(pool.map(members, inside))
    return pa.concat_tables([pa.Table.from_pylist(alone, schema=LISTING_SCHEMA), *listed])
