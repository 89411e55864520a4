"""How near a reply comes to the number of words that was asked for."""

from collections.abc import Mapping
from typing import Any

from q3mega.errors import UserError
from q3mega.rewards.instructions.constraint_counts import words
from q3mega.rewards.instructions.text_units import fold, sentences, visible
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reward

NEAR = 0.05  # of the words: "about" is met within it


@reward("length_control", needs=lambda row: _bounds(row.get("length")))
def length_control(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 - 2 x the relative deviation from row["length"], at least 0: half as long is worth nothing.

    row["length"]: {"about": N}, met within 5 %; {"at_most": N}, met from N / 2 to N; or
    {"at_least": N}. Words of a sentence that was said before, and of a text with too few different
    ones, do not count towards a minimum.
    """
    low, high = _bounds(row["length"])
    text = reply(completion)
    if text is None:
        return Verdict(0.0, "think block malformed or never closed")
    text = visible(text)
    total = words(text).total
    once = "\n\n".join({fold(s): s for s in sentences(text)}.values())
    credited = min(total, words(once).credited)
    deviation = max(0.0, (low - credited) / low, (total - high) / high)
    return Verdict(max(0.0, 1 - 2 * deviation), f"{credited} of {total} words for {row['length']}")


def _bounds(length: Any) -> tuple[float, float]:
    match length:
        case {"about": int(n)} if n > 0 and len(length) == 1:
            return n * (1 - NEAR), n * (1 + NEAR)
        case {"at_most": int(n)} if n > 0 and len(length) == 1:
            return n / 2, n
        case {"at_least": int(n)} if n > 0 and len(length) == 1:
            return n, float("inf")
    raise UserError(
        f"length={length!r:.80} must be one of about, at_most and at_least with a number of words"
    )
