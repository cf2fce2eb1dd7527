"""Whether the two tables of matches/NAME agree with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pipelines.errors import counted
from pipelines.results.matches import MatchTables, PairKey, pair_key
from pipelines.store.findings import Finding, RemoveRows


def disagreements(tables: MatchTables) -> Iterator[Finding]:
    """What is wrong between the two tables: pairs that are there twice, matches without a pair, other counts."""

    def finding(pair: PairKey, sentence: str) -> Finding:
        table = tables.path_of("pairs")
        return Finding("rows", table, sentence, RemoveRows(table, frozenset(["\0".join(pair)])))

    matches_of: Counter[tuple[str, str]] = Counter()
    for path in tables.matches.files():
        rows = tables.matches.read_file(path, ["image_a", "image_b"])
        of_pair = rows.group_by(["image_a", "image_b"]).aggregate([([], "count_all")])
        columns = (of_pair[name].to_pylist() for name in ("image_a", "image_b", "count_all"))
        matches_of.update({(a, b): count for a, b, count in zip(*columns, strict=True)})
    seen: set[PairKey] = set()
    rows = tables.pairs.read(["image_a", "image_b", "kept"])
    for a, b, kept in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        if pair_key(a, b) in seen:
            yield finding(pair_key(a, b), f"{' and '.join(pair_key(a, b))} are a pair twice")
        seen.add(pair_key(a, b))
        if (found := matches_of.pop((a, b), 0)) != kept:
            held = counted(found, "match", "matches")
            yield finding(pair_key(a, b), f"{a} and {b} have {held}, their pair says {kept:,}")
    for a, b in matches_of:
        yield finding(pair_key(a, b), f"{a} and {b} have matches, but are not a pair")
