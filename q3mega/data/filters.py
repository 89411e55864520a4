"""The two filters of the cold start (Qwen3 report, section 4.1), and domain balance.

Each returns the name of the rule that drops an item, or None. They look at text alone; what they
drop is counted by rule and shown in the report.
"""

import random
import re
from collections.abc import Collection, Sequence

from q3mega.data.tasks.base import Problem
from q3mega.data.tasks.solutions import boxed, check

_NUMBER = re.compile(r"\d+")
_PROSE = re.compile(r"[A-Za-z]+ [A-Za-z]+")  # says something instead of doing a step
_ASCII_WORDS = re.compile(r"[A-Za-z]+")
# function words of the languages that a small English-German-Chinese teacher slips into
_FOREIGN = frozenset([
    "der", "die", "das", "und", "ist", "nicht", "wir", "auch",
    "noch", "jetzt", "weiter", "fertig", "gut", "ein", "eine", "mit",
])  # fmt: skip


def query_filter(query: Problem, answered_without_thinking: bool) -> str | None:
    """Drop what cannot be verified, asks several things, or needs no thinking.

    answered_without_thinking: the judge got it right directly (a model's answer, not a guess here).
    """
    if not query.answer:
        return "not_verifiable"
    if len(re.findall(r"[?]|(?<=\d)\.(?=\s|$)", query.question)) > 1:
        return "several_questions"
    return "answerable_without_thinking" if answered_without_thinking else None


def response_filter(
    query: Problem, thinking: str, response: str, validation: Collection[str] = ()
) -> str | None:
    """The six rules, in the report's order. validation: questions held out before generating."""
    answer = boxed(response)
    if answer is None or not check(query, answer):
        return "wrong_answer"
    lines = [line for line in thinking.splitlines() if line.strip()]
    if _repeats(lines):
        return "repetition"
    if _similar(thinking, validation, query.question):
        return "validation_copy"
    if any(_foreign(line) for line in lines):
        return "language_mixing"
    if sum(not _PROSE.search(line) for line in lines) < max(1, query.difficulty - 1):
        return "guess"
    if not _agree(lines, answer):
        return "disagreement"
    return None


def balance(queries: Sequence[Problem], seed: int) -> list[Problem]:
    """As many of every family as of the rarest one, shuffled."""
    families: dict[str, list[Problem]] = {}
    for query in queries:
        families.setdefault(query.family, []).append(query)
    smallest = min(map(len, families.values()), default=0)
    rng = random.Random(seed)
    kept = [q for members in families.values() for q in rng.sample(members, smallest)]
    rng.shuffle(kept)
    return kept


def _repeats(lines: list[str]) -> bool:
    """A block of whole lines that comes three times in a row."""
    for size in range(1, len(lines) // 3 + 1):
        for start in range(len(lines) - 3 * size + 1):
            block = lines[start : start + size]
            if lines[start : start + 3 * size] == block * 3:
                return True
    return False


def _similar(text: str, validation: Collection[str], own: str) -> bool:
    return any(question in text for question in validation if question != own)


def _foreign(line: str) -> bool:
    """A letter outside the Latin script's ASCII part, or a function word of another language."""
    if any(c.isalpha() and not c.isascii() for c in line):
        return True
    return any(word.lower() in _FOREIGN for word in _ASCII_WORDS.findall(line))


def _agree(lines: list[str], answer: str) -> bool:
    """The thinking ends in the summary's answer: as its last number, or as what its lines list."""
    last = _NUMBER.findall(lines[-1]) if lines else []
    listed = [line.split(":")[0].strip() for line in lines]
    digits = answer.split()
    return bool(last) and (last[-1] == answer or listed[-len(digits) :] == digits)
