"""Repetition: the share of runs of words that were not said before."""

import re
from collections.abc import Mapping
from typing import Any

from q3mega.data.language import IDEOGRAPHS
from q3mega.rewards.registry import Verdict, reward

WORDS = 3
# Han and kana stand alone, and no piece is longer than a word: a loop without spaces is one, too.
_LONGEST = 20  # characters
_PIECE = re.compile(rf"[{IDEOGRAPHS}]|[^\s{IDEOGRAPHS}]{{1,{_LONGEST}}}")
_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")


@reward("repetition")
def repetition(completion: str, row: Mapping[str, Any]) -> Verdict:
    """Distinct word triples over all, thinking included: 1 without a repeat, towards 0 in a loop.

    Two Chinese or Japanese characters are a word. A factor for open answers; it would punish a
    task that asks for repetition.
    """
    pieces = _PIECE.findall(completion.lower())
    ideographs = sum(map(bool, map(_IDEOGRAPH.match, pieces)))
    length = 2 * WORDS if 2 * ideographs > len(pieces) else WORDS
    runs = list(zip(*(pieces[i:] for i in range(length)), strict=False))
    share = len(set(runs)) / len(runs) if runs else 1.0
    return Verdict(share, f"{share:.2f} of the word triples are new")
