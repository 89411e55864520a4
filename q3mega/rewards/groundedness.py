r"""Answers that must come from documents, or say that these do not hold one.

A refusal is paid where the answer is missing and nowhere else, so that neither inventing nor always
refusing pays.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from q3mega.problems.generated.synthetic_documents import NOT_FOUND
from q3mega.rewards.math.answer import boxes
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reference, reward

MAX_WORDS = 12  # of a reply without a box: a longer one is no short answer
_LEAD = re.compile(r"(?:the )?(?:final )?answer(?: is)?(?::| ) ?|(?:最终)?答案(?:是|为)?[::]? ?")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")


@reward("groundedness", needs=reference)
def groundedness(completion: str, row: Mapping[str, Any]) -> Verdict:
    r"""1 for the reference in the box, or as the whole of a short reply without one. Where
    row["answer"] is NOT_FOUND, 1 for \boxed{not found} alone.

    Case, accents, punctuation at the ends, articles and separators of thousands make no difference.
    A list of candidates, two different boxes or a turn that still calls a tool earn nothing.
    """
    expected = row["answer"]
    text = reply(completion)
    if text is None:
        return Verdict(0.0, "think block malformed or never closed")
    if "<tool_call>" in completion.rpartition("</think>")[2]:
        return Verdict(0.0, "ends in a tool call")
    boxed = {normal(b) for b in boxes(text)}
    if len(boxed) > 1:
        return Verdict(0.0, "several different boxed answers")
    if not boxed and (expected == NOT_FOUND or len(text.split()) > MAX_WORDS):
        return Verdict(0.0, "no boxed answer")
    given = boxed.pop() if boxed else normal(_LEAD.sub("", normal(text), count=1))
    if given == normal(expected):
        return Verdict(
            1.0, "not found, rightly" if expected == NOT_FOUND else "as the documents say"
        )
    return Verdict(0.0, "refused though it is there" if given == NOT_FOUND else "another answer")


def normal(text: str) -> str:
    """The text as it is compared: letters and digits matter, their dress does not."""
    text = unicodedata.normalize("NFKD", _TEXT.sub(r"\1", text).replace("\\ ", " "))
    text = "".join(c for c in text if not unicodedata.combining(c)).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(
        r"^(?:the|an?) ", "", " ".join(text.split()).strip(" .,;:!\"'*$`。、！…“”‘’「」『』《》")
    )
