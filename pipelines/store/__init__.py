"""A store: its tables, its files, and how they change."""

from pipelines.store.store import Store as Store
