"""Constraints on form: how a reply starts and ends, its case, language, script and layout."""

import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from json import loads
from typing import Annotated, Any

from q3mega.data.language import scripts
from q3mega.rewards.instructions import text_units as units
from q3mega.rewards.instructions.constraints import kind
from q3mega.rewards.instructions.text_units import fold
from q3mega.rewards.language import NAMES, SCRIPTS, written_in

LanguageCode = Annotated[str, NAMES]
ScriptName = Annotated[str, SCRIPTS]
Order = Annotated[str, ("ascending", "descending")]

_FIRST_LINES = ["Here is what I found", "Zuerst das Wichtigste", "Pour commencer", "Итак", "首先"]
_LAST_LINES = ["That is all for now.", "Any other questions?", "Mehr weiß ich nicht.", "以上です。"]
_COMMAS = frozenset(",，、､،፣﹐﹑")
_QUOTES = frozenset(['""', "“”", "„“", "„”", "””", "«»", "»«", "»»", "‹›", "「」", "『』"])
_CELLS = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"\s*+:?-++:?\s*+")
_TITLE = re.compile(r"<<([^<>\n]++)>>")
_SHORT_NAMES = {"py": "python", "python3": "python", "js": "javascript", "ts": "typescript",
                "sh": "bash", "shell": "bash", "c++": "cpp", "yml": "yaml"}  # fmt: skip
_PALINDROME = 5  # letters at least
_LIST = 3  # items at least


@kind(
    "Do not use these words: {words}.",
    words=[
        ["very", "thing", "maybe"],
        ["immer", "vielleicht"],
        ["toujours", "très"],
        ["可能", "也许"],
    ],
)
def forbidden(text: str, words: list[str]) -> str | None:
    """None of `words` occurs."""
    present = [w for w in words if units.occurrences(text, w)]
    return f'"{present[0]}" is there' if present else None


@kind(
    'Start with exactly these words: "{start}"',
    settles="start",
    uses="case letters repeats",
    start=_FIRST_LINES,
)
def starts_with(text: str, start: str) -> str | None:
    """The reply starts with `start`, to the letter."""
    return None if text.startswith(units.visible(start)) else f'it starts with "{text[:30]}"'


@kind(
    'End with exactly these words and nothing after them: "{end}"',
    settles="end",
    uses="case letters repeats",
    end=_LAST_LINES,
)
def ends_with(text: str, end: str) -> str | None:
    """The reply ends with `end`, to the letter."""
    return None if text.endswith(units.visible(end)) else f'it ends with "{text[-30:]}"'


@kind("Write in capital letters only.", settles="case", uses="script")
def upper_case(text: str) -> str | None:
    """No lower-case letter occurs."""
    return _case(text, text.isupper(), str.islower)


@kind("Write in lower case only, without a single capital letter.", settles="case", uses="script")
def lower_case(text: str) -> str | None:
    """No capital letter occurs."""
    return _case(text, text.islower(), str.isupper)


def _case(text: str, right: bool, wrong: Callable[[str], bool]) -> str | None:
    if right:
        return None
    bad = (w for w in units.words(text) if any(map(wrong, w)))
    return f'"{first}" is not' if (first := next(bad, "")) else "no letters that have a case"


@kind(
    "Start every word with a capital letter, but do not write in capitals only.",
    settles="case",
    uses="script",
)
def title_case(text: str) -> str | None:
    """Every word starts with a capital letter, and not all letters are capitals."""
    all_words = units.words(text)
    if bad := next((w for w in all_words if w[0].islower()), None):
        return f'"{bad}" does not'
    fine = any(w[0].isupper() for w in all_words) and not text.isupper()
    return None if fine else "all capitals, or no letters that have a case"


@kind("Do not use any commas.", settles="commas")
def no_commas(text: str) -> str | None:
    """No comma of any script occurs."""
    commas = sum(c in _COMMAS for c in text)
    return f"{commas} commas" if commas else None


@kind("Do not use any digits.", settles="digits")
def no_digits(text: str) -> str | None:
    """No digit occurs."""
    digits = sum(map(str.isdigit, text))
    return f"{digits} digits" if digits else None


@kind("Use no word twice.", settles="repeats length", uses="script sentences layout")
def no_repeats(text: str) -> str | None:
    """No word occurs twice, whatever its case."""
    seen: set[str] = set()
    for word in units.words(text.casefold()):
        if word in seen:
            return f'"{word}" is there twice'
        seen.add(word)
    return None


@kind(
    "Answer in {code}, in whole sentences.",
    settles="language script",
    code=["ar", "de", "en", "es", "fr", "hi", "ja", "ko", "pt", "ru", "zh"],
)
def language(text: str, code: LanguageCode) -> str | None:
    """The text outside of code is in the language `code` (see `written_in`)."""
    return written_in(units.prose(text), code)


@kind(
    "Use letters of the {name} script only.",
    settles="script letters",
    name=["LATIN", "CYRILLIC", "CJK"],
)
def script(text: str, name: ScriptName) -> str | None:
    """All letters are of the script `name`."""
    letters_by_script = scripts(text)
    others = sorted(set(letters_by_script) - {name})
    return f"{others[0].title()} letters" if others else None if letters_by_script else "no letters"


@kind(
    "Answer with a JSON object or list and nothing around it.",
    settles="start end layout commas",
    uses="case",
)
def json(text: str) -> str | None:
    """The whole reply is a JSON object or list that is not empty."""
    return _json(text)[1]


@kind(
    "Answer with a JSON object that has the keys {keys}, and nothing around it.",
    settles="start end layout commas",
    uses="case letters repeats",
    keys=[["answer"], ["answer", "reason"], ["name", "steps", "source"]],
)
def json_keys(text: str, keys: list[str]) -> str | None:
    """The whole reply is a JSON object with all of `keys`."""
    value, problem = _json(text)
    if problem or not isinstance(value, dict):
        return problem or "no JSON object"
    missing = [k for k in keys if k not in value]
    return f'no key "{missing[0]}"' if missing else None


def _json(text: str) -> tuple[Any, str | None]:
    """(value, None), or (None, what is wrong)."""
    try:
        value = loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError):  # ValueError is also what an integer too long raises
        return None, "not JSON, or a key twice"
    return (value, None) if isinstance(value, dict | list) and value else (None, "nothing in it")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@kind(
    "Give a Markdown table with {columns} columns.",
    uses="layout sentences",
    columns=[2, 3, 4],
)
def table(text: str, columns: int) -> str | None:
    """A header, a rule and at least one row, each of so many cells."""
    rows = [_cells(line) for line in units.lines(units.prose(text))]
    rules = [i for i, row in enumerate(rows[:-1]) if i and all(map(_RULE.fullmatch, row or [""]))]
    if not rules:
        return "no table"
    widths = {tuple(map(len, rows[i - 1 : i + 2])) for i in rules}
    return None if (columns,) * 3 in widths else f"rows of {min(widths)} cells, {columns} asked"


def _cells(line: str) -> list[str]:
    """Of a row of a table; none for any other line."""
    if "|" not in line:
        return []
    return _CELLS.split(line.removeprefix("|").removesuffix("|"))


@kind(
    "Give a fenced code block that is marked as {language}.",
    uses="layout sentences case letters",
    language=["python", "javascript", "json", "bash"],
)
def code_block(text: str, language: str) -> str | None:
    """A closed code block is marked as `language`."""
    languages = [_SHORT_NAMES.get(name, name) for name, _ in units.code_blocks(text)]
    if _SHORT_NAMES.get(language.lower(), language.lower()) in languages:
        return None
    return f'a code block of "{languages[0]}"' if languages else "no code block"


@kind(
    'End with a postscript that starts with "{marker}".',
    settles="end",
    uses="layout sentences case letters repeats",
    marker=["P.S.", "PS:"],
)
def postscript(text: str, marker: str) -> str | None:
    """The last paragraph has a line that starts with `marker` and says something."""
    *_, last = units.paragraphs(text)
    starts = (line for line in units.lines(last) if line.startswith(marker))
    has_text = any(units.words(line.removeprefix(marker)) for line in starts)
    return None if has_text and not text.startswith(marker) else "none at the end"


@kind("Wrap the whole answer in quotation marks, with none inside.", settles="start end")
def quoted(text: str) -> str | None:
    """One pair of quotation marks is around the whole reply, and none of them inside."""
    marks = text[0] + text[-1]
    if marks not in _QUOTES or len(text) == 1:
        return f'it starts with "{text[0]}" and ends with "{text[-1]}"'
    return "more of them inside" if set(marks) & set(text[1:-1]) else None


@kind(
    "Give the answer a title in double angle brackets (<< and >>).",
    settles="title",
    uses="layout sentences",
)
def title(text: str) -> str | None:
    """A text in double angle brackets occurs."""
    has_text = any(units.words(m[1]) for m in _TITLE.finditer(text))
    return None if has_text else "none"


@kind(
    'First repeat this word for word, then go on: "{question}"',
    settles="start",
    uses="case letters repeats sentences",
    question=["What is the best way to do it?", "Wie geht das am besten?", "如何做得更好？"],
)
def repeat_first(text: str, question: str) -> str | None:
    """The reply starts with `question` and goes on."""
    reply, beginning = fold(text), fold(units.visible(question))
    if not reply.startswith(beginning):
        return f'it starts with "{text[:30]}"'
    return None if units.words(reply.removeprefix(beginning)) else "nothing after it"


@kind(
    "Give two different answers, with ****** and nothing else between them.",
    settles="stars",
    uses="layout sentences",
)
def two_responses(text: str) -> str | None:
    """Two different texts with six asterisks between them."""
    parts = text.split("******")
    if len(parts) != 2 or not all(map(units.words, parts)):
        return f"{sum(map(bool, map(units.words, parts)))} answers"
    return "the same answer twice" if fold(parts[0]) == fold(parts[1]) else None


@kind(
    "Answer with exactly one of these and nothing else: {options}.",
    settles="all",
    options=[["yes", "no"], ["true", "false", "unknown"], ["ja", "nein"], ["是", "不是"]],
)
def one_of(text: str, options: list[str]) -> str | None:
    """The reply is one of `options`, to the letter."""
    return None if text in map(units.visible, options) else f'"{text[:30]}"'


@kind(
    'Start paragraph {n} with the word "{word}".',
    settles="paragraph",
    uses="layout sentences letters repeats",
    n=[2, 3],
    word=["Finally", "Außerdem", "Ensuite", "Потом", "然后"],
)
def paragraph_starts(text: str, n: int, word: str) -> str | None:
    """Paragraph `n`, counted from 1, starts with `word`."""
    paragraphs = units.paragraphs(text)
    if len(paragraphs) < n:
        return f"{len(paragraphs)} paragraphs, {n} asked"
    word, head = fold(word), fold(paragraphs[n - 1].lstrip("#*_\"'“«„「( "))
    # One character more shows whether the word ends there.
    begins = head.startswith(word) and units.occurrences(head[: len(word) + 1], word)
    return None if begins else f'it starts with "{head[:30]}"'


@kind(f"Answer with a palindrome of {_PALINDROME} letters or more, nothing else.", settles="all")
def palindrome(text: str) -> str | None:
    """The letters and digits read the same backwards."""
    letters = [c for c in fold(text) if c.isalnum()]
    if len(letters) < _PALINDROME or len(set(letters)) == 1:
        return f"{len(set(letters))} different letters of {len(letters)}"
    return None if letters == letters[::-1] else "not the same backwards"


@kind(
    f"Give a list of {_LIST} items or more, bulleted or numbered, in {{order}} alphabetical order.",
    settles="bullets numbered",
    uses="layout sentences digits",
    order=["ascending", "descending"],
)
def sorted_list(text: str, order: Order) -> str | None:
    """The items of the first list are in alphabetical `order`."""
    list_items = units.items(text, numbered=False) or units.items(text, numbered=True)
    keys = [_plain(item) for item in list_items]
    if len(set(keys)) < _LIST:
        return f"{len(set(keys))} different items"
    for before, after in pairwise(keys):
        if (before >= after) if order == "ascending" else (before <= after):
            return f'"{after[:30]}" after "{before[:30]}"'
    return None


def _plain(text: str) -> str:
    """Letters without case and accents, which dictionaries sort so (nearly) everywhere."""
    marked = unicodedata.normalize("NFD", fold(text))
    return "".join(c for c in marked if unicodedata.category(c)[0] != "M")


@kind(
    'Let the first letters of your lines spell "{word}".',
    settles="start end layout case",
    uses="letters script sentences digits",
    word=["river", "sonne", "agua"],
)
def acrostic(text: str, word: str) -> str | None:
    """The first letters of the lines spell `word`."""
    firsts = [next((c for c in fold(line) if c.isalnum()), "") for line in units.lines(text)]
    spelt, target = "".join(firsts), "".join(filter(str.isalnum, fold(word)))
    return None if spelt == target else f'they spell "{spelt[:30]}"'
