"""Whether the two tables of parts/NAME agree with each other."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.errors import counted
from pipelines.results.parts import KEY, PartTables, keys_of
from pipelines.store.findings import Finding, Reconcile, RemoveRows


def disagreements(tables: PartTables) -> Iterator[Finding]:
    """What is wrong between the two tables: images that are there twice, or whose patches are not those of a grid."""
    table = tables.path_of("images")

    def finding(key: str, what: str) -> Finding:
        return Finding("rows", table, f"{_said(key)} {what}", RemoveRows(table, frozenset([key])))

    def without_partner(key: str, what: str) -> Finding:
        return Finding("rows", table, f"{_said(key)} {what}", Reconcile(table))

    rows = tables.images.read([*KEY, "shard"])
    keys = keys_of(rows).to_pylist()
    of_shard: dict[str, set[str]] = {}
    seen: set[str] = set()
    for key, shard in zip(keys, rows["shard"].to_pylist(), strict=True):
        if key in seen:
            yield finding(key, "is there twice")
        seen.add(key)
        of_shard.setdefault(shard, set()).add(key)
    for path in tables.patches.files():
        patches = tables.patches.read_file(path, [*KEY, "row", "col"])
        found = (
            patches.append_column("key", keys_of(patches))
            .group_by("key")
            .aggregate([([], "count_all"), ("row", "max"), ("col", "max")])
        )
        columns = (found[name].to_pylist() for name in ("key", "count_all", "row_max", "col_max"))
        held = of_shard.pop(path, set())
        for key, count, row, col in zip(*columns, strict=True):
            if key not in held:
                yield without_partner(key, f"has patches in {path}, but no image that names it")
            elif count != (row + 1) * (col + 1):
                yield finding(key, f"has {counted(count, 'patch', 'patches')} for a grid of {row + 1} x {col + 1}")
            held.discard(key)
        for key in sorted(held):
            yield without_partner(key, f"has no patches in {path}")
    for shard, held in of_shard.items():
        yield without_partner(min(held), f"names patches in {shard}, which is not there")


def _said(key: str) -> str:
    set_id, _, image_id = key.partition("\0")
    return f"{image_id} of set {set_id}"
