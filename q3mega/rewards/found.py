"""The share of wanted items that a reply names: what RULER's tasks are scored by."""

from collections.abc import Mapping
from typing import Any

from q3mega.rewards import Verdict, reward
from q3mega.rewards.mode import reply
from q3mega.rewards.text_units import occurrences, visible

MAX_CHARACTERS = 500  # of a reply, some 128 tokens: who needs more says the context again


@reward("found")
def found(completion: str, row: Mapping[str, Any]) -> Verdict:
    """The share of row["items"] in the first 500 characters after the thinking, whatever case.

    Each of row["rivals"] (optional), answers that are wrong, counts as one more that is missing.
    """
    text = reply(completion)
    if text is None:
        return Verdict(0.0, "think block malformed or never closed")
    text, items = visible(text)[:MAX_CHARACTERS], row["items"]
    hits = sum(occurrences(text, item) > 0 for item in items)
    wrong = sum(occurrences(text, rival) > 0 for rival in row.get("rivals", ()))
    return Verdict(hits / (len(items) + wrong), f"{hits} of {len(items)}, {wrong} wrong")
