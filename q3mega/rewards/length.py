"""Over-long answers: a factor that falls to 0 in the last fifth of the allowance."""

from collections.abc import Mapping
from typing import Any

from q3mega.algorithms.advantages import overlong_penalty
from q3mega.rewards import Verdict, reward


@reward("length")
def length(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 up to 4/5 of row["max_tokens"], then linearly to 0; row["tokens"] is the completion's.

    DAPO's soft punishment (2503.14476), where the buffer is 4,096 of 20,480 tokens, as a factor.
    """
    tokens, limit = row["tokens"], row["max_tokens"]
    factor = 1 + overlong_penalty(tokens, limit, limit // 5)
    return Verdict(factor, f"{tokens} of {limit} tokens")
