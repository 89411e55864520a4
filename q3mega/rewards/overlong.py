"""Over-long answers: a factor that falls to 0 in the last fifth of the allowance."""

from collections.abc import Mapping
from typing import Any

from q3mega.rewards.registry import Verdict, reward


@reward("length")
def length(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 up to 4/5 of row["max_tokens"], then linearly to 0; row["tokens"] is the completion's.

    DAPO's soft punishment (2503.14476), where the buffer is 4,096 of 20,480 tokens, as a factor.
    """
    tokens, limit = row["tokens"], row["max_tokens"]
    factor = 1 + overlong_penalty(tokens, limit, limit // 5)
    return Verdict(factor, f"{tokens} of {limit} tokens")


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """0 up to limit - buffer tokens, then linearly to -1 at limit (DAPO's soft punishment)."""
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer)) if buffer else 0.0
