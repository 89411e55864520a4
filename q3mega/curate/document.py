"""One document on its way, and the books that are kept about every step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# The labels that travel with a document to the end: of origin, and on the report's axes.
LABELS = ("source", "licence", "language", "domain", "quality", "education")


@dataclass(slots=True)
class Document:
    """A text and its labels; identity: a 64-bit hash of the text, which decides all that is drawn.

    language_probability, education: in [0, 1], by language.identify and labels.label. copies: how
    often training reads it.
    """

    text: str
    source: str
    licence: str
    language: str = ""
    language_probability: float = 0.0
    domain: str = ""
    quality: str = ""
    education: float = 0.0
    identity: int = 0
    copies: int = 1
    heldout: bool = False


# Why each of the documents goes; "" where it stays.
Step = Callable[[Sequence[Document]], Sequence[str]]


class DropCounts:
    """Documents and bytes into and out of each step, drops by reason, and seconds, of one shard."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}

    def run(self, name: str, step: Step, documents: list[Document]) -> list[Document]:
        """The documents that `step` leaves."""
        before = _bytes(documents)
        began = time.perf_counter()
        reasons = step(documents)
        self.spend(name, time.perf_counter() - began)
        kept = [d for d, reason in zip(documents, reasons, strict=True) if not reason]
        self.add(name, (len(documents), before), (len(kept), _bytes(kept)), filter(None, reasons))
        return kept

    def spend(self, name: str, seconds: float) -> None:
        """Add seconds to a step."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def add(
        self, name: str, came: tuple[int, int], stayed: tuple[int, int], reasons: Any = ()
    ) -> None:
        """Enter (documents, bytes) before and after a step."""
        row = self.steps.setdefault(name, empty())
        for side, (documents, size) in (("in", came), ("out", stayed)):
            row[side]["documents"] += documents
            row[side]["bytes"] += size
        for reason in reasons:
            row["dropped"][reason] = row["dropped"].get(reason, 0) + 1


def empty() -> dict[str, Any]:
    """The counts of a step before its first document."""
    sides = {side: {"documents": 0, "bytes": 0} for side in ("in", "out")}
    return {**sides, "dropped": {}}


def total(books: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The sum over shards of DropCounts.steps."""
    summed: dict[str, dict[str, Any]] = {}
    for steps in books:
        for name, row in steps.items():
            into = summed.setdefault(name, empty())
            for side in ("in", "out"):
                for unit, value in row[side].items():
                    into[side][unit] += value
            for reason, count in row["dropped"].items():
                into["dropped"][reason] = into["dropped"].get(reason, 0) + count
    for row in summed.values():
        row["dropped"] = dict(sorted(row["dropped"].items()))
    return summed


def size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _bytes(documents: Sequence[Document]) -> int:
    return sum(size(d.text) for d in documents)
