"""The two filters of the cold start (Qwen3 report, section 4.1), and domain balance.

Each returns the name of the rule that drops an item, or None, from the text alone. The generated
families are worked in lines of arithmetic, which can be held to stricter rules than prose; where
rules cannot tell, a judge model is asked (`data.opinions`).
"""

import itertools
import random
import re
from collections.abc import Callable, Sequence

from q3mega.data.language import IDEOGRAPHS, prose, scripts
from q3mega.data.ngrams import WORD, grams
from q3mega.problems.base import Problem
from q3mega.problems.generated.solutions import METHODS, boxed

COPIED = 13  # words in a row that an answer shares with a validation question
LOOP = 20  # words in a row that are said again
LOOPS = 0.2  # of an answer said again: a loop
FOREIGN = 0.01  # of the words in a script that the question does not have
THOUGHT = 20  # words of prose: with fewer an answer is a guess
_NUMBER = re.compile(r"\d+")
_PROSE = re.compile(r"[A-Za-z]+ [A-Za-z]+")  # says something instead of doing a step
_ASCII_WORDS = re.compile(r"[A-Za-z]+")
_PARTS = re.compile(r"\(([a-z]|[ivx]+)\)")
_QUESTION_MARKS = re.compile(r"[?？؟]+")
_HAN_PARTS = re.compile(
    r"[(（]([12])[)）](?=\s*[求证證解计計写寫若当當试試])"
)  # of a problem in Chinese
_PIECES = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]{{1,20}}")  # no word is longer
# function words of the languages that a small English-German-Chinese teacher slips into
_FOREIGN = frozenset([
    "der", "die", "das", "und", "ist", "nicht", "wir", "auch",
    "noch", "jetzt", "weiter", "fertig", "gut", "ein", "eine", "mit",
])  # fmt: skip


def query_filter(query: Problem) -> str | None:
    """Drop what cannot be verified, and what asks several things."""
    if query.meta.get("reward", "answer") == "answer" and not query.answer:
        return "not_verifiable"
    questions = len(_QUESTION_MARKS.findall(query.question))
    if _arithmetic(query):
        questions += len(re.findall(r"(?<=\d)\.(?=\s|$)", query.question))
    parts = {*_PARTS.findall(query.question), *_HAN_PARTS.findall(query.question)}
    several = any(pair <= parts for pair in ({"a", "b"}, {"i", "ii"}, {"1", "2"}))
    return "several_questions" if questions > 1 or several else None


class ResponseFilter:
    """The six rules, in the report's order, and one for an answer that never came.

    validation: questions that were held out before anything was generated.
    """

    def __init__(self, validation: Sequence[str]) -> None:
        self.validation = set(validation)
        self.grams = {g: q for q in validation for g in grams(q, COPIED)}

    def __call__(
        self, query: Problem, thinking: str, response: str, right: Callable[[str], bool]
    ) -> str | None:
        """right(text): whether the answer that a text gives is the reference."""
        if not response.strip():
            return "unfinished"
        if not right(response):
            return "wrong_answer"
        lines = [line for line in thinking.split("\n") if line.strip()]
        if _repeats(lines) or _loops(thinking):
            return "repetition"
        if self._copies(thinking, query.question):
            return "validation_copy"
        of = _ArithmeticRules if _arithmetic(query) else _ProseRules
        if of.mixed(query, lines):
            return "language_mixing"
        if of.guessed(query, lines):
            return "guess"
        return "disagreement" if of.disagrees(lines, response, right) else None

    def _copies(self, text: str, query_text: str) -> bool:
        if any(question in text for question in self.validation if question != query_text):
            return True
        shared = (self.grams.get(g, query_text) for g in grams(text, COPIED))
        return any(question != query_text for question in shared)


def balance(queries: Sequence[Problem], seed: int, most: int | None = None) -> list[Problem]:
    """As many of every domain as of the rarest one, or `most` in all, the domains in turn."""
    rng = random.Random(seed)
    domains: dict[str, list[Problem]] = {}
    for query in queries:
        domains.setdefault(query.family, []).append(query)
    if most is None:
        size = min(map(len, domains.values()), default=0)
        kept = [q for members in domains.values() for q in rng.sample(members, size)]
    else:
        shuffled = [rng.sample(members, len(members)) for members in domains.values()]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*shuffled))
        kept = [q for q in turns if q is not None][:most]
    rng.shuffle(kept)
    return kept


def _arithmetic(query: Problem) -> bool:
    return query.family in METHODS


def _repeats(lines: list[str]) -> bool:
    """A block of whole lines that comes three times in a row."""
    for size in range(1, len(lines) // 3 + 1):
        run = 0  # of lines that equal the one `size` lines on
        for line, later in zip(lines, lines[size:], strict=False):
            run = run + 1 if line == later else 0
            if run == 2 * size:
                return True
    return False


def _loops(text: str) -> bool:
    """Much of it said before, in the same words."""
    pieces = _PIECES.findall(text.lower())
    runs = [tuple(pieces[i : i + LOOP]) for i in range(len(pieces) - LOOP + 1)]
    return len(set(runs)) < (1 - LOOPS) * len(runs)


class _ArithmeticRules:
    """Of thinking in lines such as 5-1=4, in English."""

    @staticmethod
    def mixed(query: Problem, lines: list[str]) -> bool:
        """A letter outside of ASCII, or a function word of another language."""
        text = "\n".join(lines)
        if any(c.isalpha() and not c.isascii() for c in text):
            return True
        return any(word.lower() in _FOREIGN for word in _ASCII_WORDS.findall(text))

    @staticmethod
    def guessed(query: Problem, lines: list[str]) -> bool:
        return sum(not _PROSE.search(line) for line in lines) < max(1, query.difficulty - 1)

    @staticmethod
    def disagrees(lines: list[str], response: str, right: Callable[[str], bool]) -> bool:
        """Whether the thinking ends in another answer: as its last number, or as its lines list."""
        answer = boxed(response) or ""
        last = _NUMBER.findall(lines[-1]) if lines else []
        labels = [line.split(":")[0].strip() for line in lines]
        digits = answer.split()
        return not (last and (last[-1] == answer or labels[-len(digits) :] == digits))


class _ProseRules:
    """Of thinking in any language. Two Latin languages are not told apart: that is the judge's."""

    @staticmethod
    def mixed(query: Problem, lines: list[str]) -> bool:
        """Words in a script that neither the question nor mathematics has."""
        counts = scripts(prose("\n".join(lines)))
        usual = {"LATIN", "GREEK", *scripts(query.question)}
        foreign = sum(count for script, count in counts.items() if script not in usual)
        return foreign > FOREIGN * counts.total()

    @staticmethod
    def guessed(query: Problem, lines: list[str]) -> bool:
        return sum(len(WORD.findall(line)) for line in lines) < THOUGHT

    @staticmethod
    def disagrees(lines: list[str], response: str, right: Callable[[str], bool]) -> bool:
        """Whether the last answer that the thinking puts in a box is another one."""
        last = next((line for line in reversed(lines) if "\\boxed{" in line), None)
        return last is not None and not right(last)
