"""What is shown or stored as JSON: without secrets, and with null for numbers that JSON does not have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipelines.storage.secrets import hidden


def json_data(value: Any, *, decimals: int | None = None) -> Any:
    """Plain data in which NaN and infinity are None, and texts have no secrets.

    decimals: to which numbers are rounded. What is no plain data stays, and is for `json.dumps` to refuse.
    """
    if isinstance(value, Mapping):
        return {json_data(key): json_data(one, decimals=decimals) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_data(one, decimals=decimals) for one in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if decimals is None else round(value, decimals)
    return hidden(value) if isinstance(value, str) else value
