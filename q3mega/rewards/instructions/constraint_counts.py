"""Constraints that count: words, sentences, items, keywords, ...; at least, at most or exactly.

A minimum gives no credit for saying the same again, so that a keyword said a hundred times is no
long answer.
"""

import re
from collections.abc import Sequence

from q3mega.rewards.instructions import text_units as units
from q3mega.rewards.instructions.constraints import Count, Letter, kind
from q3mega.rewards.instructions.text_units import fold

_KEYWORDS = [
    "river", "window", "bread", "Garten", "Fenster", "mercado", "jardín", "livre", "дорога",
    "книга", "音楽", "花园", "شجرة", "नदी",
]  # fmt: skip
_NUMBER = re.compile(r"\d++(?:[.,:٫٬]\d++)*+")
_HIGHLIGHT = re.compile(r"(\*{1,2})(?![\s*])[^*\n]++(?<!\s)\1")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]++\](?!\()")  # [text](address) is a link
_HEADING = re.compile(r"#{1,6} ")


def _different(texts: Sequence[str]) -> Count:
    """A second copy of a sentence or an item earns nothing."""
    return Count(len(texts), len({fold(f) for f in texts}))


def _varied(texts: Sequence[str]) -> Count:
    """Of d different words at most d * d count: a text repeats words, but one word is no text.

    Running text of n words has far more than sqrt(n) different ones (Heaps' law).
    """
    return Count(len(texts), min(len(texts), len(set(texts)) ** 2))


@kind(
    "Answer in {amount:word}.",
    settles="length",
    at_least=(60, 120),
    at_most=(150, 200),
    exactly=(80, 120),
)
def words(text: str) -> Count:
    """Words of the reply."""
    return _varied(units.words(text.casefold()))


@kind(
    "Answer in {amount:sentence}.",
    settles="sentences",
    uses="layout",
    at_least=(3, 6),
    at_most=(6, 8),
    exactly=(5, 7),
)
def sentences(text: str) -> Count:
    """Sentences; a second copy of one does not count towards a minimum."""
    return _different(units.sentences(text))


@kind(
    "Write {amount:paragraph}, with an empty line between paragraphs.",
    settles="layout",
    at_least=(2, 4),
    at_most=(3, 5),
    exactly=(2, 5),
)
def paragraphs(text: str) -> Count:
    """Paragraphs, which empty lines part."""
    return _different(units.paragraphs(text))


@kind(
    "Write {amount:line}; empty ones do not count.",
    settles="layout",
    at_least=(3, 6),
    at_most=(4, 8),
    exactly=(3, 8),
)
def lines(text: str) -> Count:
    """Lines that are not blank."""
    return _different(units.lines(text))


@kind(
    "Answer in {amount:character}, blanks included.",
    settles="length",
    at_least=(300, 600),
    at_most=(1500, 2000),
)
def characters(text: str) -> Count:
    """Characters, blanks included; few different triples limit what counts."""
    triples = [text[i : i + 3] for i in range(len(text))]
    return _varied(triples)


@kind("Use {amount:different word}.", at_least=(20, 40))
def different_words(text: str) -> Count:
    """Different words, whatever their case."""
    different = len(set(units.words(text.casefold())))
    return Count(different, different)


@kind(
    "Use {amount:bullet point}.",
    settles="bullets",
    uses="layout sentences",
    at_least=(2, 5),
    exactly=(2, 5),
)
def bullets(text: str) -> Count:
    """Bulleted items outside of code."""
    return _different(units.items(text, numbered=False))


@kind(
    "Use a numbered list (1. 2. 3.) with {amount:item}.",
    settles="numbered",
    uses="layout sentences digits",
    at_least=(2, 5),
    exactly=(2, 5),
)
def numbered_items(text: str) -> Count:
    """Numbered items outside of code."""
    return _different(units.items(text, numbered=True))


@kind(
    'Write {amount:section}, each under a line that starts with "{marker}" and its number.',
    settles="sections",
    uses="layout sentences digits letters repeats",
    at_least=(2, 4),
    exactly=(2, 4),
    marker=["Section", "Part", "Abschnitt", "Partie"],
)
def sections(text: str, marker: str) -> Count:
    """Numbered from 1; a section counts for a minimum when it says what no other one says."""
    parts: list[list[str]] = []
    for line in units.lines(text):
        bare, head = fold(line.lstrip("#* ")), f"{fold(marker)} {len(parts) + 1}"
        if bare.startswith(head) and not bare[len(head) : len(head) + 1].isalnum():
            parts.append([])
        elif parts:
            parts[-1].append(line)
    filled = [text for part in parts if units.words(text := " ".join(part))]
    return Count(len(parts), _different(filled).credited)


@kind(
    "Use {amount:Markdown heading} (# or ##).",
    settles="headings",
    uses="layout sentences",
    at_least=(2, 4),
    exactly=(2, 4),
)
def headings(text: str) -> Count:
    """Markdown headings that say something."""
    heading_lines = [line for line in units.lines(units.prose(text)) if _HEADING.match(line)]
    return _different([line.lstrip("#") for line in heading_lines if units.words(line)])


@kind(
    "Leave {amount:placeholder} in square brackets, such as [name].",
    at_least=(1, 3),
    exactly=(2, 4),
)
def placeholders(text: str) -> Count:
    """Texts in square brackets that are no links."""
    marked = [m[0] for m in _PLACEHOLDER.finditer(units.prose(text))]
    return _different([f for f in marked if units.words(f)])


@kind("Highlight {amount:part} with *asterisks*.", uses="layout", at_least=(1, 3), exactly=(2, 4))
def highlighted(text: str) -> Count:
    """Parts between asterisks."""
    marked = [m[0].strip("*") for m in _HIGHLIGHT.finditer(units.prose(text))]
    return _different([f for f in marked if units.words(f)])


@kind(
    "Write {amount:word} in capital letters only.",
    settles="case",
    uses="script",
    at_least=(1, 4),
    at_most=(2, 5),
)
def capital_words(text: str) -> Count:
    """Of two letters or more: I and A are capital everywhere."""
    all_words = units.words(text)
    return _different([w for w in all_words if w.isupper() and sum(map(str.isalpha, w)) > 1])


@kind(
    'Use the word "{word}" {amount:time}.',
    uses="letters repeats",
    at_least=(1, 3),
    at_most=(2, 4),
    exactly=(1, 3),
    word=_KEYWORDS,
)
def keyword(text: str, word: str) -> Count:
    """Occurrences of `word`, whatever its case."""
    times = units.occurrences(text, word)
    return Count(times, times)


@kind(
    'Use the letter "{letter}" {amount:time}.',
    uses="letters",
    at_least=(3, 8),
    letter=["e", "k", "z", "ö", "я"],
)
def letter(text: str, letter: Letter) -> Count:
    """Occurrences of `letter`, whatever its case."""
    times = text.casefold().count(letter.casefold())
    return Count(times, times)


@kind("Give {amount:number} in digits.", settles="digits", at_least=(1, 4), exactly=(2, 4))
def numbers(text: str) -> Count:
    """Different numbers in digits."""
    return _different(_NUMBER.findall(text))


@kind(
    "Ask {amount:question}.",
    settles="questions",
    uses="sentences layout start end",
    at_least=(1, 3),
    exactly=(1, 3),
)
def questions(text: str) -> Count:
    """Different questions."""
    return _different([s for s in units.sentences(text) if units.is_question(s)])
