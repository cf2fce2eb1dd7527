"""How two sets of settings differ: one comparison for every result, store and training with settings for life."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def differences(
    before: Mapping[str, Any],
    asked: Mapping[str, Any],
    phrase: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
) -> list[str]:
    """A phrase for every setting in which `asked` differs from `before`, in the order of their names.

    Args:
        phrase: with {key}, {before} and {asked}, such as "cluster.{key} was {before}".
        defaults: what a setting had that `before` lacks: it is younger than what was made.
        only: keys to compare; default: all of both.
    """
    known = {**(defaults or {}), **before}
    keys = sorted({*known, *asked}) if only is None else sorted(only)
    return [
        phrase.format(key=key, before=known.get(key), asked=asked.get(key))
        for key in keys
        if known.get(key) != asked.get(key)
    ]
