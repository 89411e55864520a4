"""Multiple choice: the letters of "B", "(B)", "B. text", "A, C" and "ACD"."""

import re
from dataclasses import dataclass

from q3mega.rewards.math.notation import words

_LEAD = re.compile(
    r"(?i:the )?(?i:correct )?(?i:option|choice|answer|故?选项?|应选|选择|答案|選択肢|正解)"
    r"(?i: is|为|是|は)?[: ]*(?=\(?[A-Z](?![a-z]))"
)
_ONE = re.compile(r"\(?([A-Z])(?:项|です|[).:]+ ?(.*))?", re.DOTALL)
_SEVERAL = re.compile(r"\(?[A-Z]\)?(?:(?:[,;/&、和与及と ]|\band\b)*\(?[A-Z]\)?)+")
_WITH_TEXT = re.compile(
    r"(?:\(([A-J])\)|([A-J])(?:[).]|:(?![A-Z0-9]*(?:[:=]|$)))) ?(.+)", re.DOTALL
)
# Another letter after the first, as a choice and not as a word of the option's own text.
_ANOTHER = re.compile(
    r"^(?:or|and|not|[,;/&]|或|和|与|と)+ ?\(?([A-Z])\b|^\(?([A-Z])\)?$"
    r"|(?<![A-Za-z0-9])\(([A-J])\)|(?:\bor|\band|[,;/&]|或|和|与|と) ?\(?([A-J])[.):]"
)


@dataclass(frozen=True)
class Choice:
    """letters, in order, and what the option says where that is told."""

    letters: str
    text: str = ""


def choice_of_reference(reference: str) -> Choice | None:
    """The option or options that a reference names; None where it is no choice.

    A list or run of letters is one as answer keys write it: from A to H, in order, each once.
    """
    text = words(reference)
    if re.fullmatch(r"[A-Z]|\([A-Z]\)", text):
        return Choice(text.strip("()"))
    letters = _letters(text) if _SEVERAL.fullmatch(text) else ""
    if re.fullmatch("[A-H]{2,8}", letters) and letters == "".join(sorted(set(letters))):
        return Choice(letters)
    if match := _WITH_TEXT.fullmatch(text):
        return Choice(match.group(1) or match.group(2), match.group(3))
    return None


def choice_of_answer(answer: str) -> Choice | None:
    """What an answer chooses; None where it names no option, or hedges between several."""
    text = _LEAD.sub("", words(answer), count=1)
    if _SEVERAL.fullmatch(text):
        return Choice("".join(sorted(_letters(text))))
    if match := _ONE.fullmatch(text):
        letter, content = match.group(1), match.group(2) or ""
        others = {other for groups in _ANOTHER.findall(content) for other in groups if other}
        return None if others - {letter} else Choice(letter, content)
    return None


def _letters(text: str) -> str:
    return "".join(re.findall("[A-Z]", text))
