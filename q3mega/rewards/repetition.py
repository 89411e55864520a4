"""Repetition: the share of word triples that were not said before."""

from collections.abc import Mapping
from typing import Any

from q3mega.rewards import Verdict, reward

WORDS = 3


@reward("repetition")
def repetition(completion: str, row: Mapping[str, Any]) -> Verdict:
    """Distinct word triples over all, thinking included: 1 without a repeat, towards 0 in a loop.

    A factor for open answers; it would punish a task that asks for repetition.
    """
    words = completion.lower().split()
    triples = list(zip(*(words[i:] for i in range(WORDS)), strict=False))
    share = len(set(triples)) / len(triples) if triples else 1.0
    return Verdict(share, f"{share:.2f} of the word triples are new")
