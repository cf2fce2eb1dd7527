"""The two mistakes this package reports: an unusable model request and an unusable image."""

from __future__ import annotations


class ModelError(ValueError):
    """A model, its weights or its settings cannot be used as asked.

    The message is one sentence: what was asked, what was found, what to do.
    """


class ImageError(ValueError):
    """An image cannot be used; the message says what is wrong with it."""
