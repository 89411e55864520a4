r"""The verifiable answer: what \boxed{} after the thinking holds, against the reference."""

import re
from collections.abc import Mapping
from typing import Any

from q3mega.rewards.math.equality import equal
from q3mega.rewards.math.notation import normal
from q3mega.rewards.math.quantities import number
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reference, reward

MAX_WAYS = 8  # in which one answer is boxed: each may cost the time of a comparison

# A box that opens, another command (an escaped brace is none of TeX's own), a brace.
_TOKEN = re.compile(
    r"\\(?:boxed|fbox)\s*\{|\\(?:[a-zA-Z]+|\\(?!boxed|fbox)|[^\\a-zA-Z])|[{}]", re.DOTALL
)
_UNBRACED = re.compile(
    r"\\boxed *(?=[-+0-9]|\\[a-zA-Z]|[A-Z](?![A-Za-z]))((?:\\[a-zA-Z]+|\{[^{}]*\}|[^\s$\\{}])+)"
)


@reward("answer", needs=reference)
def answer(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for the reference answer, exactly or in value.

    Several boxes must all hold it, or each one item of a reference that is a list: a reply that
    names two answers has not decided, whichever comes last.
    """
    expected = row["answer"]
    given, problem = _boxed(completion)
    if problem:
        return Verdict(0.0, problem)
    if given == [expected]:
        return Verdict(1.0, "exact")
    is_right = len(given) <= MAX_WAYS and all(equal(expected, way) for way in given)
    if not is_right and not (len(given) > 1 and equal(expected, "; ".join(given))):
        several = len(given) > 1
        return Verdict(0.0, "several different boxed answers" if several else "wrong answer")
    copied = all(_copied(way, row) for way in given)
    return Verdict(0.0, "copied question") if copied else Verdict(1.0, "equal")


@reward("answered")
def answered(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for one boxed number, right or wrong: beside `mode`, so that obeying without answering
    earns nothing."""
    given, problem = _boxed(completion)
    if problem:
        return Verdict(0.0, problem)
    values = {number(way) for way in given}
    if len(values) > 1:
        return Verdict(0.0, "several different boxed answers")
    return Verdict(0.0, "not a number") if None in values else Verdict(1.0, "a number")


def _copied(given: str, row: Mapping[str, Any]) -> bool:
    """Whether an expression that is not written as the reference is stands in the question so:
    "Expand (x+1)^2" is not answered by (x+1)^2, though that is what the reference equals."""
    if not row.get("messages") or number(given) is not None or normal(given).isalnum():
        return False
    question, given = (re.sub(r"[\s$]", "", t) for t in (row["messages"][-1]["content"], given))
    return normal(given) != normal(row["answer"]) and given in question


def boxes(text: str) -> list[str]:
    r"""The contents of every \boxed{...} and \fbox{...} that is closed, inner braces matched; a box
    that holds nothing but a box is not another. Without any, what follows a \boxed with no brace.
    """
    contents: list[str] = []
    opened: list[tuple[int, int] | None] = []  # where a box and its content start; None: a group
    last = (0, 0)  # from the start of the box that was closed last to its end
    for token in _TOKEN.finditer(text):
        if token.group().endswith("{") and token.group() != r"\{":
            is_box = token.group() != "{"
            opened.append(token.span() if is_box else None)
        elif token.group() == "}" and opened and (box := opened.pop()):
            start, end = box[1], token.start()
            around = text[start : last[0]] + text[last[1] : end] if last[0] >= start else "a"
            if around.strip(" $\n"):
                contents.append(text[start:end])
            last = (box[0], token.end())
    return contents or [match.rstrip(".,;:!?") for match in _UNBRACED.findall(text)]


def _boxed(completion: str) -> tuple[list[str], str]:
    """(the different boxed answers, their white space made single, what is wrong or "")."""
    text = reply(completion)
    if text is None:
        return [], "think block malformed or never closed"
    given = list(dict.fromkeys(" ".join(content.split()) for content in boxes(text)))
    return given, "" if given else "no boxed answer"
