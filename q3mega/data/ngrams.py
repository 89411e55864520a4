"""Words and word n-grams: what near-duplicates and contamination are told by, in one home.

`grams` is the definition, on strings. `Words` computes the same sets as 64-bit hashes with numpy,
many documents at once, for corpora that strings are too slow for; it also folds letter case, width
and emphasis, so that a text that was only set differently has the same n-grams.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from q3mega.data.language import IDEOGRAPHS, SPACELESS, marks

# A vowel sign belongs to its word. Where words have no spaces between them, signs part the run: its
# pieces stand for words.
_SPACED = rf"[^\W{IDEOGRAPHS}{SPACELESS}]"
WORD = re.compile(rf"[{IDEOGRAPHS}]|{_SPACED}(?:{_SPACED}|[{marks()}])*|(?:(?=[{SPACELESS}])\w)+")

_LIMIT = 0x40000  # no letter or digit of Unicode lies above
_LETTER, _IDEOGRAPH, _SPACELESS, _MARK = 1, 2, 3, 4  # what is none of these separates words
_SPAN = 1 << 16  # positions in a word, or a gram, that have a factor of their own

Hashes = NDArray[np.uint64]


def grams(text: str, n: int) -> set[str]:
    """Word n-grams in lower case; a shorter text is one gram."""
    words = WORD.findall(text.lower()) or [text]
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def fold(text: str) -> str:
    """Letters of one case and one width (NFKC); an underscore is emphasis, no letter."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return text.casefold().replace("_", " ")


class Words:
    """Hashes of the words of folded texts, all in a row.

    hashes (W,) uint64; offsets (D + 1,) int64: where each text's words begin. Two words, or grams,
    share a hash by chance with probability 2^-64.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        folded = [fold(text) for text in texts]
        joined = "\n".join(folded) + "\n"
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        kind = _kinds()[np.minimum(codes, _LIMIT - 1)]
        positions = np.arange(len(kind))
        base = np.maximum.accumulate(np.where(kind == _MARK, 0, positions))  # what a mark stands on
        kind = np.where(kind == _MARK, (kind[base] == _LETTER) * np.uint8(_LETTER), kind)
        begins = kind == _IDEOGRAPH
        before = np.concatenate([[0], kind[:-1]])
        begins |= ((kind == _LETTER) | (kind == _SPACELESS)) & (before != kind)
        inside = np.flatnonzero(kind)
        first = np.flatnonzero(begins[inside])
        self.offsets = np.zeros(len(texts) + 1, np.int64)
        if len(first):
            lengths = np.diff(np.append(first, len(inside)))
            positions = np.arange(len(inside)) - np.repeat(first, lengths)
            terms = codes[inside].astype(np.uint64) * _factors()[positions % _SPAN]
            self.hashes = mixed(np.add.reduceat(terms, first))
        else:
            self.hashes = np.zeros(0, np.uint64)
        ends = np.cumsum([len(text) + 1 for text in folded])
        self.offsets[1:] = np.searchsorted(inside[first], ends)

    def grams(self, n: int) -> tuple[Hashes, NDArray[np.int64]]:
        """(hashes, offsets (D + 1,)) of the n-grams of each text; fewer words have none."""
        starts, offsets = self.starts(n)
        return self.at(starts, n), offsets

    def starts(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the words that an n-gram begins at, offsets (D + 1,) of each text's)."""
        count = np.maximum(np.diff(self.offsets) - n + 1, 0)
        offsets = np.concatenate([[0], np.cumsum(count)])
        return np.arange(offsets[-1]) + np.repeat(self.offsets[:-1] - offsets[:-1], count), offsets

    def whole(self, text: int) -> np.uint64:
        """All words of one text as one gram."""
        first, last = self.offsets[text : text + 2]
        return self.at(np.array([first]), int(last - first))[0]

    def at(self, starts: NDArray[np.int64], n: int) -> Hashes:
        """Hashes of the n words from each of `starts`."""
        total = np.full(len(starts), n, np.uint64)
        for k in range(n):
            total += self.hashes[starts + k] * _factors()[k % _SPAN]
        return mixed(total)


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """What each character is, by its code."""
    characters = "".join(map(chr, range(_LIMIT)))
    kinds = np.fromiter(map(str.isalnum, characters), np.uint8, _LIMIT)
    for match in re.finditer(f"[{SPACELESS}]+", characters):
        kinds[match.start() : match.end()] *= _SPACELESS
    for kind, ranges in ((_MARK, marks()), (_IDEOGRAPH, IDEOGRAPHS)):
        for match in re.finditer(f"[{ranges}]+", characters):
            kinds[match.start() : match.end()] = kind
    return kinds


@functools.cache
def _factors() -> Hashes:
    """Powers of an odd number, modulo 2^64."""
    return np.cumprod(np.full(_SPAN, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)


def mixed(x: Hashes) -> Hashes:
    """splitmix64's finaliser: every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
