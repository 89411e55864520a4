"""The share of wanted items that a reply names: what RULER's tasks are scored by."""

from collections.abc import Mapping
from typing import Any

from q3mega.errors import UserError
from q3mega.rewards.instructions.text_units import fold, occurrences, visible
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reward

MAX_CHARACTERS = 500  # of a reply, some 128 tokens: who needs more says the context again


def _check_row(row: Mapping[str, Any]) -> None:
    if not texts(row, "items"):
        raise UserError("items=[] asks for nothing: give the texts that are wanted")
    texts({"rivals": [], **row}, "rivals")


@reward("string_match", needs=_check_row)
def string_match(completion: str, row: Mapping[str, Any]) -> Verdict:
    """The share of row["items"] in the first 500 characters after the thinking, whatever case.

    Each of row["rivals"] (optional), answers that are wrong, counts as one more that is missing.
    """
    items, rivals = row["items"], row.get("rivals", ())
    text = reply(completion)
    if text is None:
        return Verdict(0.0, "think block malformed or never closed")
    text = visible(text)[:MAX_CHARACTERS]
    hits = sum(occurrences(text, item) > 0 for item in items)
    wrong = sum(occurrences(text, rival) > 0 for rival in rivals)
    return Verdict(hits / (len(items) + wrong), f"{hits} of {len(items)}, {wrong} wrong")


def texts(row: Mapping[str, Any], name: str) -> list[str]:
    """A row's field that has to be a list of texts with something in each.

    Raises UserError for anything else.
    """
    value = row.get(name)
    if isinstance(value, list | tuple) and all(isinstance(t, str) and fold(t) for t in value):
        return list(value)
    raise UserError(f"{name}={value!r:.80} must be a list of texts, none of them blank")
