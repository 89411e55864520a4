r"""The verifiable answer: what the last \boxed{} after the thinking holds, against the reference."""

import re
from collections.abc import Mapping
from typing import Any

from q3mega.data.chat import parse
from q3mega.rewards import Verdict, reward

_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
MAX_CHARACTERS = 200  # a longer "answer" is not one, and would only cost the parser time


@reward("answer")
def answer(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for the reference answer, exactly or by math-verify. Two different boxes are no answer."""
    message = parse(completion)
    if not message.closed:
        return Verdict(0.0, "thinking was never closed")
    boxes = {" ".join(b.split()) for b in _BOX.findall(message.content)}
    if len(boxes) != 1:
        return Verdict(0.0, "no boxed answer" if not boxes else "several different boxed answers")
    (given,) = boxes
    if given == row["answer"]:
        return Verdict(1.0, "exact")
    return Verdict(1.0, "equal") if equal(row["answer"], given) else Verdict(0.0, "wrong answer")


def equal(reference: str, given: str) -> bool:
    """Mathematical equality by math-verify, for answers that hold a digit; False when it cannot tell.

    Plain integers are compared here: math-verify costs milliseconds and uses signals for its time
    limits, which only work in the main thread.
    """
    digits = re.search(r"\d", given) and re.search(r"\d", reference)
    if not digits or len(given) > MAX_CHARACTERS:
        return False
    if re.fullmatch(r"[\d\s]+", reference) and re.fullmatch(r"-?[\d\s]+", given):
        return reference.split() == given.split()
    from math_verify import parse as parse_math
    from math_verify import verify

    try:
        gold, target = parse_math(f"${reference}$"), parse_math(f"${given}$")
        return bool(gold and target and verify(gold, target))
    except Exception:  # whatever untrusted text does to a parser, it is not the right answer
        return False
