r"""The verifiable answer: what \boxed{} after the thinking holds, against the reference."""

import re
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from q3mega.rewards import Verdict, reward
from q3mega.rewards.mode import reply

MAX_CHARACTERS = 200  # a longer "answer" is not one, and would only cost the parser time
SECONDS = 3  # for math-verify's parser, and again for its comparison
_NUMBER = re.compile(r"[-+]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?")
_FRACTION = re.compile(r"([-+]?)\\frac\{([0-9]+)\}\{([0-9]+)\}")


@reward("answer")
def answer(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for the reference answer, exactly or in value. Two different boxes are no answer."""
    given, problem = _single_box(completion)
    if given is None:
        return Verdict(0.0, problem)
    if given == row["answer"]:
        return Verdict(1.0, "exact")
    return Verdict(1.0, "equal") if equal(row["answer"], given) else Verdict(0.0, "wrong answer")


@reward("answered")
def answered(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for one boxed number, right or wrong: beside `mode`, so that obeying without answering
    earns nothing."""
    given, problem = _single_box(completion)
    if given is None:
        return Verdict(0.0, problem)
    return Verdict(1.0, "a number") if number(given) is not None else Verdict(0.0, "not a number")


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


def number(text: str) -> Fraction | None:
    r"""The value of '-1,200.5', '1/2' or '\frac{1}{2}'; None for anything else."""
    text = _FRACTION.sub(r"\1\2/\3", text.strip())
    parts = text.split("/")
    if len(text) > MAX_CHARACTERS or len(parts) > 2 or not all(map(_NUMBER.fullmatch, parts)):
        return None
    above, below = (Fraction(p.replace(",", "")) for p in (*parts, "1")[:2])
    return above / below if below else None


def equal(reference: str, given: str) -> bool:
    """Equality in value; False when it cannot be told.

    A number must be answered with a number: math-verify would take "3+5", the question said again,
    for 8. Lists of numbers compare item by item, words not at all (they match exactly or are
    wrong), and what is left is math-verify's, which takes up to seconds and stops itself by
    signals: outside of the main thread it cannot, and this raises RuntimeError.
    """
    if len(given) > MAX_CHARACTERS:
        return False
    if (value := number(reference)) is not None:
        return number(given) == value
    if re.fullmatch(r"[0-9]+( [0-9]+)+", reference):
        return re.split(r"[\s,]+", given.strip("[] ")) == reference.split()
    if not re.search(r"[0-9\\]", reference):
        return False
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify needs the main thread: score symbolic answers there")
    from math_verify import parse as parse_math  # takes a second, and few recipes need it
    from math_verify import verify

    try:
        gold, target = (parse_math(f"${s}$", parsing_timeout=SECONDS) for s in (reference, given))
        return bool(gold and target and verify(gold, target, timeout_seconds=SECONDS))
    except Exception:  # whatever untrusted text does to a parser, it is not the right answer
        return False
