r"""How an answer is built, from its normal text: lists, brackets, names, unions, matrices."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from q3mega.rewards.math.notation import CJK


@dataclass(frozen=True)
class Node:
    r"""A piece of an answer: its normal text, and how it is built.

    kind: "" for a single thing, "set" and "union" (in any order), brackets such as "()" and "[)"
    for pairs and intervals, ":" for a ratio, "matrix", "row", "such that" for a set and its
    condition, and "name" for `x=5` or `x\in S`: the name is `label`, the one item what it stands
    for.
    """

    text: str
    kind: str = ""
    items: tuple["Node", ...] = ()
    label: str = ""


# A word of Chinese or Japanese joins two answers only where it is no part of another word.
_BETWEEN = rf"(?:(?<![{CJK}])|(?<=[0-9}}][{CJK}])|(?<=[0-9}}][{CJK}]{{2}}))(?:%s)(?![{CJK}])"
_OR = (
    r"\\text\{,? *(?:or|或者?|または|又は) *\}|\bor\b|\\vee"
    rf"|{_BETWEEN % '或者?|または|又は'}"
)
_BOTH = (
    r"\\text\{,? *(?:and|且|和|与|及|かつ|と) *\}|\band\b|\\wedge"
    rf"|{_BETWEEN % '并且|且|和|与|及|以及|かつ|と'}"
)
OR = re.compile(rf",? *(?:{_OR}) *")
AND = re.compile(rf",? *(?:{_BOTH}) *")
_JOINED = re.compile(rf",? *(?:{_OR}|{_BOTH}) *")
_NAME = re.compile(
    r"((?:\\?[A-Za-z]+(?: [A-Z]+)?|\|[A-Z]{2}\|)(?:_\w|_\{[^{}]*\})?'*(?:\^\{-1\})?"
    r"(?:\([A-Za-z0-9]\))?"
    r"|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-zA-Z])) *"
)
_ARRAY = re.compile(
    r"(\[|\\\{)?\\begin\{([pbBvV]?matrix|array|cases|aligned|gathered)\}(?:\{[lcr| ]*\})?"
    r"(.*)\\end\{\2\}(\]?)",
    re.DOTALL,
)
_BUILDER = re.compile(r"(\(?[a-z](?:,[a-z])*\)?(?:\\in[^|:<>=]+)?)[|:](.+)", re.DOTALL)
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_PAIRS = {"(": ")[", "[": "])"}


def read(text: str, *, thousands: bool = True) -> Node:
    r"""How a normal text is built. thousands: 1,234 is a number and not a pair."""
    parts = [p for p in split(_JOINED.sub(",", text), ",;", thousands=thousands) if p]
    if len(parts) == 1:
        parts = [p for p in split(text, r"\\") if p]
    if len(parts) > 1:
        items = [read(p, thousands=False) for p in parts]
        return Node(text, "set", tuple(flat for item in items for flat in _flat(item)))
    if (match := _NAME.match(text)) and not re.search(r"[=<>]", value := text[match.end() :]):
        return Node(text, "name", (read(value, thousands=thousands),), match.group(1))
    if len(parts := split(text, r"\cup")) > 1:
        return Node(text, "union", tuple(map(read, parts)))
    if match := _ARRAY.fullmatch(text):
        return _array(text, match)
    if condition := such_that(text):
        head, tail = (read(part, thousands=False) for part in condition)
        return Node(text, "such that", (head, tail))
    if text[:1] == "{" and closes_last(text):
        return read(text[1:-1].strip(), thousands=False)
    if text[:2] == r"\{" and closes_last(text):
        if not (content := text[2:-2].strip()):
            return Node(r"\emptyset")
        inside = read(content, thousands=False)
        return Node(text, "set", inside.items) if inside.kind == "set" else inside
    if text[:1] in _PAIRS and closes_last(text):
        parts = split(text[1:-1], ",;")
        if len(parts) > 1:
            items = [read(p.strip(), thousands=False) for p in parts]
            return Node(text, text[0] + text[-1], tuple(items))
        if text[0] + text[-1] == "()":
            return read(text[1:-1].strip(), thousands=thousands)
    if len(parts := split(text, ":")) > 1:
        return Node(text, ":", tuple(map(read, parts)))
    if text.count(r"\pm") == 1 and r"\mp" not in text:
        signs = [re.sub(r"\\pm *", sign, text).removeprefix("+") for sign in "+-"]
        return Node(text, "set", tuple(map(read, signs)))
    return Node(text)


def such_that(text: str) -> tuple[str, str] | None:
    r"""('x', 'x>1') of '\{x|x>1\}'."""
    brace = r"\{" if text.startswith(r"\{") else "{"
    if not (text.startswith(brace) and closes_last(text)):
        return None
    match = _BUILDER.fullmatch(text[len(brace) : -len(brace)].strip())
    return (match.group(1), match.group(2)) if match else None


def _array(text: str, match: re.Match[str]) -> Node:
    r"""A matrix, or what \begin{cases} holds: equations, or values with their conditions."""
    opening, environment, content, _ = match.groups()
    rows = [r.strip() for r in re.split(r"\\\\", content) if r.strip()]
    is_system = opening == r"\{" or environment in ("cases", "aligned", "gathered")
    if is_system and "&" not in content:
        return read(",".join(row.rstrip(",;.") for row in rows), thousands=False)
    cells = [[c.strip(" ,;.") if is_system else c.strip() for c in r.split("&")] for r in rows]
    nodes = [Node("", "row", tuple(read(c, thousands=False) for c in row)) for row in cells]
    if environment[0] in "vV" and not is_system:
        return Node(text)
    return Node(text, "set" if is_system else "matrix", tuple(nodes))


def _flat(item: Node) -> tuple[Node, ...]:
    r"""The items of `1\pm x` among others of a set; any other item is itself."""
    return item.items if item.kind == "set" and r"\{" not in item.text else (item,)


def _tokens(text: str) -> Iterator[tuple[int, str, int]]:
    r"""(position, token, depth of brackets there); \{ is one token, and so is a command."""
    depth = 0
    for match in re.finditer(r"\\begin\{\w+\}|\\end\{\w+\}|\\[a-zA-Z]+|\\.|.", text):
        token = match.group()
        depth -= token in (")", "]", "}", r"\}") or token.startswith(r"\end{")
        yield match.start(), token, depth
        depth += token in ("(", "[", "{", r"\{") or token.startswith(r"\begin{")


def split(text: str, separators: str, *, thousands: bool = False) -> list[str]:
    r"""text cut at separators outside of brackets: a command such as \cup, or any of some signs."""
    signs = (separators,) if separators.startswith("\\") else tuple(separators)
    parts, start = [], 0
    for position, token, depth in _tokens(text):
        if thousands and token == "," and THOUSANDS.match(text, position):
            continue
        if depth == 0 and token in signs:
            parts.append(text[start:position].strip())
            start = position + len(token)
    return [*parts, text[start:].strip()]


def closes_last(text: str) -> bool:
    """Whether the bracket that opens text is closed by its end, and of a kind that may close it."""
    closed = [position for position, token, depth in _tokens(text) if depth <= 0 and position]
    if not closed or closed[0] < len(text) - (2 if text[0] == "\\" else 1):
        return False
    closing = {"{": ("}",), "\\": (r"\}",), "(": (")", "]"), "[": ("]", ")")}
    return text.endswith(closing[text[0]])
