"""Which text of a reply is its program: Markdown's fenced blocks, as models write them.

A fence is three or more ` or ~ (CommonMark 0.31, 4.5), in a list too. Its first word is the
language, in any of the ways people mark Python: python3, Py, {.python .numberLines}, python
title="a.py". A fence inside a string or a comment of a program closes nothing.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_OPENING = re.compile(
    r"^(?P<lead>[ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)?)"
    r"(?P<fence>`{3,}+|~{3,}+)(?P<info>[^\n]*+)\n",
    re.MULTILINE,
)
_LANGUAGE = re.compile(r"[ \t]*\{?[ \t]*\.?([\w+#.-]*)")
_PYTHON = re.compile(r"i?py(?:thon|py)?[\d.]*", re.IGNORECASE)
# What may hide a fence: comments, strings up to their line's end, in three quotes up to the text's.
_HIDING = (
    r"(?P<quotes>\'{3}|\"{3})(?:\\.|(?!(?P=quotes)).)*+(?:(?P=quotes)|\Z)"
    r"|'(?:\\.|[^'\\\n])*+'?|\"(?:\\.|[^\"\\\n])*+\"?|\#[^\n]*+"
)
_SESSION = re.compile(r"\s*>>> ")
# A line that only a program has, among sample output and lines for a shell.
_STATEMENT = re.compile(
    r"^[ \t]*(?:(?:import|from|def|class|for|while|if|with|async|return|raise)\s|try:|@\w"
    r"|(?:\w+\.)*(?:print|write|exec|main|solve)\(|[A-Za-z_][\w., \[\]]*(?:[-+*/|&^]?=)[^=])",
    re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block. language: the first word of its fence, "" without one."""

    language: str
    text: str


def program(reply: str, entry_point: str | None = None) -> str | None:
    """The program of a reply, None if there is none.

    The last block marked as Python counts; where none is marked, the last without a mark; without
    any fence the reply itself. Blocks that hold no statement (sample output, lines for a shell, a
    session with >>>) stand back behind those that do, and with an entry point (a function's name)
    blocks that do not define it, such as a demonstration, behind those that do.
    """
    text = reply.replace("\r\n", "\n")
    blocks = list(fenced(text))
    if not blocks:
        return text if text.strip() else None
    marked = [block.text for block in blocks if _PYTHON.fullmatch(block.language)]
    choice = marked or [block.text for block in blocks if not block.language]
    choice = [text for text in choice if text.strip()]
    choice = [t for t in choice if _STATEMENT.search(t) and not _SESSION.match(t)] or choice
    if entry_point is not None:
        choice = [text for text in choice if _defines(text, entry_point)] or choice
    return choice[-1] if choice else None


def fenced(text: str) -> Iterator[Block]:
    """The fenced blocks of a text with lines that end in \\n. The last may be cut short."""
    at = 0
    while opening := _OPENING.search(text, at):
        info = opening["info"]
        if opening["fence"][0] == "`" and "`" in info:  # code in a line, by CommonMark
            at = opening.end() - 1
            continue
        marked = _LANGUAGE.match(info)
        assert marked is not None  # every part of it may be empty
        language = marked[1]
        inner, at = _inside(text, opening.end(), opening["fence"], language)
        yield Block(language, _without_indent(inner, len(opening["lead"].expandtabs(4))))


def _inside(text: str, start: int, fence: str, language: str) -> tuple[str, int]:
    """What stands between a fence and the one that closes it, and where the text goes on."""
    mark = re.escape(fence[0])
    closing = rf"(?P<close>(?<!{mark}){mark}{{{len(fence)},}}[ \t]*$)"
    line = re.compile(rf"^[ \t]*{closing}", re.MULTILINE)
    end = None
    if not language or _PYTHON.fullmatch(language):
        # Behind the last line of a program, too: models forget the line break.
        pieces = re.compile(rf"{_HIDING}|{closing}", re.MULTILINE | re.DOTALL)
        end = next((m for m in pieces.finditer(text, start) if m["close"] is not None), None)
    end = end or line.search(text, start)
    return (text[start : end.start("close")], end.end()) if end else (text[start:], len(text))


def _without_indent(text: str, width: int) -> str:
    """Without up to `width` blanks before each line, and without those that all lines have."""
    lines = [re.sub(rf"^[ \t]{{0,{width}}}", "", line) for line in text.split("\n")]
    margins = {line[: len(line) - len(line.lstrip(" \t"))] for line in lines if line.strip()}
    shortest = min(margins, key=len, default="")
    if shortest and all(margin.startswith(shortest) for margin in margins):
        lines = [line.removeprefix(shortest) for line in lines]
    return "\n".join(lines)


def _defines(text: str, name: str) -> bool:
    """Whether a program binds a name by def, class or assignment."""
    defined = rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+{re.escape(name)}\b"
    assigned = rf"^{re.escape(name)}[ \t]*(?::[^=\n]*)?=[^=]"
    return re.search(f"{defined}|{assigned}", text, re.MULTILINE) is not None
