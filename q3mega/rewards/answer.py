r"""The verifiable answer: what \boxed{} after the thinking holds, against the reference."""

import re
from collections.abc import Mapping
from typing import Any

from q3mega.rewards import Verdict, reference, reward
from q3mega.rewards.equality import equal
from q3mega.rewards.mode import reply
from q3mega.rewards.notation import normal, number


@reward("answer", needs=reference)
def answer(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for the reference answer, exactly or in value. Two different boxes are no answer."""
    wanted = row["answer"]
    given, problem = _single_box(completion)
    if given is None:
        return Verdict(0.0, problem)
    if given == wanted:
        return Verdict(1.0, "exact")
    if not equal(wanted, given):
        return Verdict(0.0, "wrong answer")
    return Verdict(0.0, "copied question") if _copied(given, row) else Verdict(1.0, "equal")


@reward("answered")
def answered(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for one boxed number, right or wrong: beside `mode`, so that obeying without answering
    earns nothing."""
    given, problem = _single_box(completion)
    if given is None:
        return Verdict(0.0, problem)
    return Verdict(1.0, "a number") if number(given) is not None else Verdict(0.0, "not a number")


def _copied(given: str, row: Mapping[str, Any]) -> bool:
    """Whether an expression that is not written as the reference is stands in the question so:
    "Expand (x+1)^2" is not answered by (x+1)^2, though that is what the reference equals."""
    if not row.get("messages") or number(given) is not None or normal(given).isalnum():
        return False
    question, given = (re.sub(r"[\s$]", "", t) for t in (row["messages"][-1]["content"], given))
    return normal(given) != normal(row["answer"]) and given in question


def boxes(text: str) -> list[str]:
    r"""The contents of every \boxed{...} that is closed, inner braces matched."""
    found, starts = [], []
    for i, character in enumerate(text):
        if character == "{":
            starts.append(i + 1 if text.endswith(r"\boxed", 0, i) else None)
        elif character == "}" and starts and (start := starts.pop()) is not None:
            found.append(text[start:i])
    return found


def _single_box(completion: str) -> tuple[str | None, str]:
    """(the boxed answer, its white space made single) or (None, what is wrong)."""
    text = reply(completion)
    if text is None:
        return None, "think block malformed or never closed"
    found = {" ".join(b.split()) for b in boxes(text)}
    if len(found) != 1:
        return None, "several different boxed answers" if found else "no boxed answer"
    return found.pop(), ""
