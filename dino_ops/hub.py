"""Pretrained weights from the Hugging Face hub or its local cache, failing fast where there is no network."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import timm
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from dino_ops.errors import ModelError

_FILES = ("model.safetensors", "pytorch_model.bin")
_PROBE_SECONDS = 4
_WAYS = (
    "give model.weights=/path/to/file, or, to try things out, model.name=dinoray_tiny (small, comes with dinoray) or "
    "model.weights=random"
)


def download_pretrained(timm_name: str) -> Path:
    """Path of the published weights of a timm model, downloaded unless they are in the hub's local cache.

    Raises ModelError where the model has no published weights, or they are not cached and the hub is out of reach.
    """
    config = timm.get_pretrained_cfg(timm_name)
    repository = config.hf_hub_id if config is not None else None
    if not repository:
        raise ModelError(f"{timm_name} has no published weights: {_WAYS}")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _FILES
    for file in files:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    reason = _why_unreachable()
    for file in files if reason is None else ():
        try:
            return Path(hf_hub_download(repository, file))
        except Exception as e:  # the hub's client raises its own, the HTTP library's and the system's errors
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
    raise ModelError(
        f"pretrained weights of {timm_name} are not in the local cache and cannot be downloaded from {repository} "
        f"({reason}): {_WAYS}"
    )


def _why_unreachable() -> str | None:
    """One short request, because the hub's own client retries a name that does not resolve for most of a minute."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # an error is an answer, too
    except OSError as e:
        return f"{constants.ENDPOINT} does not answer: {getattr(e, 'reason', e)}"
    return None
