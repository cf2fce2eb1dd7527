"""What a check finds in a store, and how each finding is mended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.store.parquet import DataFile

Kind = Literal["file", "rows", "log", "transaction", "result", "setting"]

# How a finding is mended


@dataclass(frozen=True)
class Publish:
    """The transaction that is not completed is completed."""


@dataclass(frozen=True)
class RemoveFile:
    """A table's file goes, with all its rows and what belongs to them elsewhere, which are made again."""

    table: str
    file: str


@dataclass(frozen=True)
class RestoreFile:
    """A table's file is there, whole, and its log lost it: the log has it again."""

    table: str
    file: DataFile


@dataclass(frozen=True)
class RemoveRows:
    """Rows with some keys go from a table and from the one that belongs to it.

    table: that of data or the one that leads it. keys: as the tables join them; of images, the image_id.
    """

    table: str
    keys: frozenset[str]


@dataclass(frozen=True)
class Reconcile:
    """Rows of a table go that have no partner in the one that belongs to it."""

    table: str


@dataclass(frozen=True)
class CountAgain:
    """The centroids of a clustering are written again, from its model and its assignments. path: clusters/NAME."""

    path: str


@dataclass(frozen=True)
class RemoveResult:
    """A result has nothing left of what it needs: all its rows go, and its pointer. path: KIND/NAME."""

    path: str


@dataclass(frozen=True)
class RemoveLeftover:
    """A file that nobody needs goes. path: in the store."""

    path: str


@dataclass(frozen=True)
class RewriteTransaction:
    """The newest transaction, which all tables have, is written again from the one before it."""

    number: int


@dataclass(frozen=True)
class WriteLogAgain:
    """The log of a table is written again, from the transactions that made it."""

    table: str


@dataclass(frozen=True)
class ByHand:
    """Nothing here can mend it. advice: what can be done, as a sentence."""

    advice: str


Mend = (
    Publish
    | RemoveFile
    | RestoreFile
    | RemoveRows
    | Reconcile
    | CountAgain
    | RemoveResult
    | RemoveLeftover
    | RewriteTransaction
    | WriteLogAgain
    | ByHand
)


@dataclass(frozen=True)
class Finding:
    """Something of a store that is not as it should be.

    kind: a file of a table or of a result, rows that disagree, a table's log, a transaction, a whole result, or a file
    of settings. path: of what it is about, in the store. sentence: what is wrong.
    """

    kind: Kind
    path: str
    sentence: str
    mend: Mend

    @property
    def remedy(self) -> str:
        """How it is mended, in words that follow "mended:"."""
        return self.mend.advice if isinstance(self.mend, ByHand) else _REMEDIES[type(self.mend)]

    @property
    def group(self) -> tuple[str, str, type[Mend]]:
        """Findings of one group are shown a few of many."""
        return (self.kind, self.path, type(self.mend))


_REMEDIES: dict[type[Mend], str] = {
    Publish: "it is completed",
    RemoveFile: "the file's rows are removed, with what belongs to them, and can be made again",
    RestoreFile: "the log has the file again",
    RemoveRows: "these rows are removed, with what belongs to them, and can be made again",
    Reconcile: "rows without a partner are removed",
    CountAgain: "the centroids are written again, from the model and the assignments",
    RemoveResult: "what is left of the result is removed, and it can be made again",
    RemoveLeftover: "the file is removed",
    RewriteTransaction: "it is written again, from the one before it",
    WriteLogAgain: "it is written again, from the transactions that made the table",
}


def shown(findings: Sequence[Finding], most_of_a_group: int) -> Iterator[str]:
    """Their sentences, group by group; of many in a group the first, and how many more there are."""
    groups: dict[tuple[str, str, type[Mend]], list[str]] = {}
    for finding in findings:
        groups.setdefault(finding.group, []).append(finding.sentence)
    for sentences in groups.values():
        yield from sentences[:most_of_a_group]
        if (more := len(sentences) - most_of_a_group) > 0:
            yield f"... and {more} more like the last"
