"""No document that holds an evaluation text: shared word 13-grams, as hashes.

As `text.decontaminate`, for corpora that need more speed, and by words that are also folded in
width and emphasis (ngrams.fold), since what is copied into the web is set anew. What it does not
find: hyphenation at line ends, digits that are grouped otherwise, another wording.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from q3mega.curate.config import Decontamination
from q3mega.curate.document import Document
from q3mega.curate.sources import MalformedRow, rows, shards
from q3mega.data.ngrams import Hashes, Words

_OWN = 100  # held-out problems of each family, as evaluations ask them
_BITS = 22  # of a hash, that index the table of heads
_SHIFT = np.uint64(64 - _BITS)


def evaluation_texts(config: Decontamination, shard_mb: int) -> list[str]:
    """All that training must not hold; UserError where a row cannot be read."""
    texts = []
    for number, given in enumerate(config.evaluation):
        name = f"decontamination.evaluation.{number}"
        for shard in shards(name, given.glob, given.text, shard_mb):
            malformed = MalformedRow(shard, given.text, 0.0)
            for row in rows(shard, given.text):
                malformed.count(row)
                texts.append(row.text or "")
            malformed.check()
    if config.own:
        from q3mega.problems import FAMILIES, generate  # heavy, and no worker needs it

        drawn = (generate(family, _OWN, seed=0, heldout=True) for family in FAMILIES)
        texts += [problem.question for problems in drawn for problem in problems]
    return texts


class EvalNgramIndex:
    """Hashes of the n-grams that no document may hold, sorted, by n; kept as one .npz file.

    heads: of the first `head` words of each; almost all places of a document have none of them.
    """

    def __init__(self, head: int, heads: Hashes, grams: dict[int, Hashes]) -> None:
        self.head, self.heads, self.grams = head, heads, grams
        self.table = np.zeros(1 << _BITS, bool)
        self.table[heads >> _SHIFT] = True

    @classmethod
    def of(cls, texts: Sequence[str], most: int, shortest: int) -> tuple["EvalNgramIndex", int]:
        """(the index, how many texts have fewer than `shortest` words and are not looked for)."""
        words = Words(texts)
        lengths = np.diff(words.offsets)
        starts = {most: words.starts(most)[0]}
        for n in range(shortest, most):
            starts[n] = words.offsets[:-1][lengths == n]
        grams = {n: np.unique(words.at(s, n)) for n, s in starts.items() if len(s)}
        heads = np.unique(words.at(np.concatenate(list(starts.values())), shortest))
        return cls(shortest, heads, grams), int((lengths < shortest).sum())

    def step(self, documents: Sequence[Document]) -> list[str]:
        """Which documents hold an evaluation text."""
        hit = np.zeros(len(documents), bool)
        words = Words([d.text for d in documents])
        starts, _ = words.starts(self.head)
        heads = words.at(starts, self.head)
        maybe = np.flatnonzero(self.table[heads >> _SHIFT])
        maybe = starts[maybe[np.isin(heads[maybe], self.heads)]]
        document = np.searchsorted(words.offsets, maybe, side="right") - 1
        for n, forbidden in self.grams.items():
            fits = maybe + n <= words.offsets[document + 1]
            matches = np.isin(words.at(maybe[fits], n), forbidden)
            hit[document[fits][matches]] = True
        return ["evaluation_text" if h else "" for h in hit]

    def write(self, path: Path) -> None:
        """Write the index to a file."""
        arrays = {str(n): hashes for n, hashes in self.grams.items()}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, head=self.head, heads=self.heads, **arrays)

    @classmethod
    def read(cls, path: Path) -> "EvalNgramIndex":
        """Read an index that `write` has written."""
        with np.load(path) as stored:
            grams = {int(n): stored[n] for n in stored.files if n.isdigit()}
            return cls(int(stored["head"]), stored["heads"], grams)
