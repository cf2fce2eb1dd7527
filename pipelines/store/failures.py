"""Rows of the failures table: which image, at which stage, and what was wrong, in words."""

from __future__ import annotations

import datetime as dt
from typing import Any

from pipelines.storage.secrets import hidden, without_credentials

MESSAGE_LENGTH = 1000
# Where the storage failed and not the image, the next run tries it again.
STORAGE_ERROR = "StorageError"


def failure_row(
    source: dict[str, Any], stage: str, error: BaseException | str, message: str, attempts: int, run_id: str
) -> dict[str, Any]:
    """A failures row (with `position`); `message` is kept short and printable."""
    return {
        "position": source["position"],
        "image_id": source["image_id"],
        "uri": without_credentials(source["uri"]),
        "source_version": source["source_version"],
        "stage": stage,
        "error": error if isinstance(error, str) else type(error).__name__,
        "message": " ".join(hidden(message).split())[:MESSAGE_LENGTH],
        "attempts": attempts,
        "run_id": run_id,
        "failed_at": dt.datetime.now(dt.UTC),
    }
