"""Evaluation: RULER (arXiv 2404.06654), long contexts of a wanted length in the model's own tokens.

Nine tasks in turn. Four hide sentences with numbers in real text: one sentence; one among three
with other keys; four with one key, all asked for; four keys, all asked for. One follows a variable
through assignments, with a second chain beside it. Two count words in a list: the ten that are
frequent, and the three most frequent of a skewed draw. Two ask about one of many short documents,
and about a person whom one of them leads to.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from q3mega.data import package_text
from q3mega.data.chat import render
from q3mega.data.tokenizer import Tokenizer
from q3mega.errors import UserError
from q3mega.problems.base import Row

LONG_LIST = 8192  # tokens; from here on a common word is there 30 times and a rare one 3 times
_SOURCES = ("year_2889", "python_reference", "stdlib_docs")
_HOPS, _COMMON, _FREQUENT = 4, 10, 3
_ADJECTIVES = ("amber", "brave", "calm", "dusty", "eager", "gentle", "hollow", "quiet", "silent")
_NOUNS = ("anchor", "bridge", "candle", "desert", "engine", "falcon", "garden", "island", "meadow")
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
_FIRST_NAMES = ("Ada", "Boris", "Carla", "Dirk", "Edda", "Farid", "Greta", "Hugo", "Ines", "Jaro")
_TOWNS = ("Bergen", "Cork", "Gdansk", "Graz", "Lindau", "Lund", "Nantes", "Porto", "Siena", "Tartu")
_TRADES = ("baker", "farmer", "glazier", "miller", "printer", "sailor", "tailor", "weaver")

_Pieces = Callable[[int], list[str]]


@dataclass(frozen=True)
class _Task:
    """pieces: the context's lines, more for a larger size. items, rivals: see `rewards.found`."""

    pieces: _Pieces
    before: str
    asked: str
    items: list[str]
    rivals: list[str]


@cache
def _essay() -> list[str]:
    """Sentences of real prose, in order."""
    documents = (d for name in _SOURCES for d in package_text.documents(name))
    sentences = (" ".join(s.split()) for d in documents for s in re.split(r"(?<=[.!?])\s+", d))
    return [s for s in sentences if 20 < len(s) < 300]


def _hidden(rng: random.Random, lines: list[str], hay: Callable[[int], str]) -> _Pieces:
    """The lines in their order, anywhere in hay(0), hay(1), ..."""
    depths = sorted(rng.random() for _ in lines)

    def pieces(size: int) -> list[str]:
        haystack = [hay(i) for i in range(size)]
        for depth, line in reversed(list(zip(depths, lines, strict=True))):
            haystack.insert(round(depth * size), line)
        return haystack

    return pieces


def _in_essay(rng: random.Random, lines: list[str]) -> _Pieces:
    essay = _essay()
    start = rng.randrange(len(essay))
    return _hidden(rng, lines, lambda i: essay[(start + i) % len(essay)])


def _needles(rng: random.Random, keys: int, values: int, queried: int) -> _Task:
    drawn = rng.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], keys)
    numbers = [str(v) for v in rng.sample(range(10**6, 10**7), keys * values)]
    pairs = list(zip(drawn * values, numbers, strict=True))
    lines = [f"The pass number of the {key} is {number}." for key, number in pairs]
    rng.shuffle(lines)
    keys_queried = drawn[:queried]
    return _Task(
        _in_essay(rng, lines),
        "Some pass numbers are hidden in the following text. Keep them in mind.",
        f"Which pass numbers does the text give for the {' and the '.join(keys_queried)}? "
        "Name each one.",
        [number for key, number in pairs if key in keys_queried],
        [number for key, number in pairs if key not in keys_queried],
    )


def _variables(rng: random.Random, length: int) -> _Task:
    names = ["".join(rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 5)) for _ in range(2 * _HOPS + 2)]
    values = [str(v) for v in rng.sample(range(10**4, 10**5), 2)]
    chains = [names[: _HOPS + 1], names[_HOPS + 1 :]]
    steps = [
        [f"VAR {b} = {a}" for a, b in pairwise([value, *chain])]
        for value, chain in zip(values, chains, strict=True)
    ]
    turns = rng.sample([0, 1] * (_HOPS + 1), 2 * _HOPS + 2)
    lines = [steps[turn].pop(0) for turn in turns]
    return _Task(
        _in_essay(rng, lines),
        "Variables are set in the following text, some of them to others. Keep track of them.",
        f"Which variables have the value {values[0]} in the end? Name all of them.",
        chains[0],
        chains[1],
    )


def _coined(start: int, i: int) -> str:
    """The i-th of 343,000 different made-up words."""
    n = (start + 100_003 * i) % len(_SYLLABLES) ** 3  # the step shares no factor with it
    syllables = (n // len(_SYLLABLES) ** k % len(_SYLLABLES) for k in range(3))
    return "".join(_SYLLABLES[s] for s in syllables)


def _common_words(rng: random.Random, length: int) -> _Task:
    start, order = rng.randrange(343_000), rng.random()
    often, seldom = (30, 3) if length >= LONG_LIST else (10, 1)
    common = [_coined(start, i) for i in range(_COMMON)]

    def pieces(size: int) -> list[str]:
        rare = [_coined(start, _COMMON + i) for i in range(size)]
        return random.Random(order).sample(both := common * often + rare * seldom, len(both))

    return _Task(
        pieces,
        "Some words of the following list are there many times, the others seldom.",
        f"Which are the {_COMMON} words that are there most often? Give nothing but the words.",
        common,
        [_coined(start, _COMMON + i) for i in range(100)],  # else copying a short list would do
    )


def _frequent_words(rng: random.Random, length: int) -> _Task:
    start, order = rng.randrange(343_000), rng.random()
    ranked = [_coined(start, i) for i in range(300)]

    def pieces(size: int) -> list[str]:
        """How often a word is there falls with the square of its rank."""
        counts = [int(0.61 * size / rank**2) for rank in range(1, len(ranked) + 1)]
        words = [w for w, count in zip(ranked, counts, strict=True) for _ in range(count)]
        return random.Random(order).sample(words, len(words))

    return _Task(
        pieces,
        "Some words of the following coded text are there more often than others.",
        f"Which {_FREQUENT} words are there most often? Give nothing but the words.",
        ranked[:_FREQUENT],
        ranked[_FREQUENT:10],
    )


def _question(rng: random.Random, hops: int) -> _Task:
    start, order = rng.randrange(343_000), rng.random()

    def person(i: int) -> str:
        return f"{_FIRST_NAMES[i % len(_FIRST_NAMES)]} {_coined(start, i).capitalize()}"

    def document(i: int, trade: str) -> str:
        town = random.Random(f"{order}/{i}").choice(_TOWNS)
        return (
            f"{person(i)} grew up in {town}. {person(i)} became a {trade} and had learned a lot "
            f"from {person(i + 1)}."
        )

    def other(i: int) -> str:
        return document(i + 2, random.Random(f"trade/{order}/{i}").choice(_TRADES))

    trades = rng.sample(_TRADES, 2)
    lines = rng.sample([document(i, trade) for i, trade in enumerate(trades)], 2)
    who = person(0) if hops == 1 else f"the person from whom {person(0)} had learned a lot"
    right = trades[hops - 1]
    return _Task(
        _hidden(rng, lines, other),
        "Answer by the following documents.",
        f"What did {who} become? Give the trade alone.",
        [right],
        [trade for trade in _TRADES if trade != right],
    )


TASKS: dict[str, Callable[[random.Random, int], _Task]] = {
    "single": lambda rng, length: _needles(rng, 1, 1, 1),
    "multi-key": lambda rng, length: _needles(rng, 4, 1, 1),
    "multi-value": lambda rng, length: _needles(rng, 1, 4, 1),
    "multi-query": lambda rng, length: _needles(rng, 4, 1, 4),
    "variables": _variables,
    "common words": _common_words,
    "frequent words": _frequent_words,
    "question": lambda rng, length: _question(rng, 1),
    "two-hop question": lambda rng, length: _question(rng, 2),
}


def rows(n: int, seed: int, length: int, tokenizer: Tokenizer) -> list[Row]:
    """n rows whose prompts take `length` tokens, within 2 % or one document and never more, chat
    markup included. Group: the task.

    Raises UserError where a task needs more than `length`.
    """
    rng = random.Random(f"ruler/{seed}/{length}")
    names = list(TASKS)
    return [_row(rng, names[i % len(names)], length, tokenizer) for i in range(n)]


def _row(rng: random.Random, name: str, length: int, tokenizer: Tokenizer) -> Row:
    task = TASKS[name](rng, length)

    def messages(size: int) -> list[dict[str, str]]:
        body = "\n".join(task.pieces(size))
        return [{"role": "user", "content": f"{task.before}\n\n{body}\n\n{task.asked}"}]

    size = _largest(length, lambda k: _tokens(messages(k), tokenizer))
    if not size:
        raise UserError(f"ruler:{length} is too short for the task {name}: give more tokens")
    return {
        "messages": messages(size),
        "reward": "string_match",
        "items": task.items,
        "rivals": task.rivals,
        "group": name,
    }


def _tokens(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(render(messages, add_generation_prompt=True)))


def _largest(length: int, tokens: Callable[[int], int]) -> int:
    """The largest size that takes at most `length` tokens, or close below; 0 where none does.

    Tokens grow about evenly with the size, so a secant finds it in a few looks.
    """
    low, at_low = 0, tokens(0)
    if tokens(1) > length:
        return 0
    high = max(1, length // 8)
    at_high = tokens(high)
    while at_high <= length:
        low, at_low, high = high, at_high, 2 * high
        at_high = tokens(high)
    while high - low > 1 and at_low < 0.99 * length:
        guess = low + int((high - low) * (length - at_low) / (at_high - at_low))
        guess = min(high - 1, max(low + 1, guess))
        size = tokens(guess)
        if size <= length:
            low, at_low = guess, size
        else:
            high, at_high = guess, size
    return low
