r"""How an answer is written: LaTeX put into one form, numbers, units, lists, brackets.

Only strings are moved about here: nothing is evaluated, so untrusted text may be read in process.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 200  # a longer "answer" is not one, and would only cost the parser time

_SYMBOLS = {
    "−": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "<=": r"\le ", ">=": r"\ge ",
    "!=": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "°": r"^\circ", "²": "^2", "³": "^3",
    r"\%": "%", r"\$": "$", "{,}": ",", r"\lbrace": r"\{", r"\rbrace": r"\}",
}  # fmt: skip
_FORMS = [
    (r"\\(left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
    (r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))|(?<!\\)\\!", ""),  # 1\,000, 1,\!000
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~", " "),
    (r", +(?=[0-9]{3}(?![0-9]))", ";"),  # "1, 234" is two numbers, 1,234 is one
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:math(?:rm|bf|it)|text(?:bf|it|rm|normal)|mbox|operatorname) *\{", r"\\text{"),
    (r"\\(le|ge|ne)q(?![a-zA-Z])", r"\\\1"),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\text\{ *([^{}]*?) *\}", r"\\text{\1}"),
    (r"\^ *\{ *\\circ *\}|\^ *\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])", r"^\\circ"),
    (r"\\frac *([0-9])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\}) *([0-9])", r"\1{\2}"),
    (r"\\sqrt *([0-9a-zA-Z])", r"\\sqrt{\1}"),
    (r"([_^]) *\{ *([0-9a-zA-Z]) *\}", r"\1\2"),
    (r"(\\[a-zA-Z]+) +(?=[0-9])", r"\1"),
    (r"\\mathbb *([A-Z])", r"\\mathbb{\1}"),
    (r"(?<![0-9A-Za-z})]) +| +(?![0-9A-Za-z])", ""),  # but "1 2" is not 12
    (r"(\^\\circ) *(?:\\text\{)?([CF])(?![a-zA-Z])\}?", r"\1\2"),
    (r"^\\text\{([^{}]*)\}[.,]?$", r"\1"),
]  # fmt: skip

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_MIXED = re.compile(r"([0-9]+)(?:\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))")
_RATIO = re.compile(rf"({_DECIMAL})/([-+]?{_DECIMAL})")
_FRACTION = re.compile(rf"\\frac\{{([-+]?{_DECIMAL})\}}\{{([-+]?{_DECIMAL})\}}")
_POWER_OF_TEN = re.compile(
    r"([1-9](?:\.[0-9]+)?)(?:[eE]([-+]?[0-9]{1,3})"
    r"|(?:\\times|\\cdot|\*)10\^(?:([0-9])|\{([-+]?[0-9]{1,3})\}))"
)
_PLAIN = re.compile(_DECIMAL)
_VALUE = re.compile(
    "|".join(
        f"(?:{p.pattern})" for p in (_REPEATING, _MIXED, _POWER_OF_TEN, _RATIO, _FRACTION, _PLAIN)
    )
)

_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce",
    "mL": "ml milliliter millilitre", "L": "liter litre", "s": "sec second", "min": "minute",
    "h": "hr hour", "day": "", "week": "", "month": "", "year": "", "mph": "", "kph": "",
    "N": "newton", "J": "joule", "W": "watt", "V": "volt", "Hz": "hertz", "Pa": "pascal",
    "K": "kelvin", "unit": "", "rad": "radian", r"^\circ": "degree deg", r"^\circC": "",
    r"^\circF": "", "%": "percent pct percentage", "$": "dollar USD", "cent": "¢", "€": "euro EUR",
    "£": "GBP", "¥": "yen yuan",
}  # fmt: skip
_UNIT = {alias: unit for unit, more in _UNITS.items() for alias in (unit, *more.split())}
_UNIT_TOKEN = re.compile(r"\^\\circ[CF]?|\^\{?-?[0-9]\}?|[A-Za-z]+|[%$€£¥¢/]")
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "squared": "^2", "cubed": "^3"}


def normal(text: str) -> str:
    r"""One form for one notation: \dfrac12, \frac{1}{2} and $\frac 1 2$ read the same."""
    text = " ".join(text.split())
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) * 2:
            text = text[len(opening) : -len(closing)]
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    for pattern, form in _FORMS:
        text = re.sub(pattern, form, text)
    return text.strip().rstrip(".,").strip()


def words(text: str) -> str:
    r"""text without \text{} around its pieces."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text)


def number(text: str) -> Fraction | None:
    r"""The value of '-1,200.5', '1/2', '\frac{1}{2}', '1\frac12', '0.\overline{3}', '1.2e3' and
    '1.2\times10^{3}'; None for anything else, a sum or a power among it: those are work left over.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = normal(text)
    sign = -1 if text.startswith("-") else 1
    value = _unsigned(text[1:] if text[:1] in ("-", "+") else text)
    return None if value is None else sign * value


def _unsigned(text: str) -> Fraction | None:
    if _PLAIN.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if found := _RATIO.fullmatch(text) or _FRACTION.fullmatch(text):
        above, below = (Fraction(part.replace(",", "")) for part in found.groups())
        return above / below if below else None
    if found := _POWER_OF_TEN.fullmatch(text):
        mantissa, *exponents = found.groups()
        return Fraction(mantissa) * Fraction(10) ** int(next(filter(None, exponents)))
    if found := _MIXED.fullmatch(text):
        mixed, above, below = (Fraction(part) for part in found.groups() if part)
        return mixed + above / below if above < below else None
    if found := _REPEATING.fullmatch(text):
        whole, fixed, period = found.groups()
        parts = Fraction(int(period), 10 ** len(period) - 1) + int(fixed or 0)
        return int(whole or 0) + parts / 10 ** len(fixed)
    return None


def unit(text: str, *, noun: bool) -> str | None:
    r"""The canonical name of a unit, 'cm^2' for '\text{ square centimeters}', "" for none; None
    when it is not one. noun: any word of four letters, or in \text{}, counts: '12 apples'.

    A unit of one letter stands in \text{} or after a space: 5m is five times m.
    """
    if not text:
        return ""
    marked = r"\text{" in text
    plain = re.sub(r"\bper\b", "/", words(text)).replace(r"\cdot", " ")
    tokens = _UNIT_TOKEN.findall(plain)
    if "".join(tokens) != plain.replace(" ", "") or (len(text) == 1 and text.isalpha()):
        return None
    found: list[str] = []
    power = ""
    for token in tokens:
        if token in ("square", "sq", "cubic"):
            power = _POWERS[token]
            continue
        singular = token[:-1] if len(token) > 2 and token.endswith("s") else token
        if token in _POWERS or (token[0] == "^" and token not in _UNIT):
            if not found:
                return None
            found[-1] += _POWERS.get(token) or "^" + token.strip("^{}")
        elif (name := _UNIT.get(token) or _UNIT.get(singular)) or token == "/":
            found.append((name or "/") + power)
            power = ""
        elif noun and (marked or (text[0] == " " and len(token) > 3)):
            found.append(singular.lower() + power)
            power = ""
        else:
            return None
    return " ".join(found)


def quantity(text: str, *, noun: bool = True) -> tuple[Fraction, str] | None:
    """(value, unit) of a number with its unit before or behind it, a percent sign among them."""
    sign = -1 if text.startswith("-") else 1
    text = text[1:].strip() if text[:1] in ("-", "+") else text
    currency = text[0] if text[:1] in tuple("$€£¥") else ""
    text = text.removeprefix(currency)
    if not (found := _VALUE.match(text)) or (value := _unsigned(found.group())) is None:
        return None
    rest = text[found.end() :]
    name = unit(rest, noun=noun)
    if name is None or (currency and name not in ("", currency)):
        return None
    return sign * value, currency or name


@dataclass(frozen=True)
class Node:
    r"""A piece of an answer: its normal text, and how it is built.

    kind: "" for a single thing, "set" and "union" (in any order), brackets such as "()" and "[)"
    for pairs and intervals, ":" for a ratio, "matrix", "row", and "name" for `x=5` or `x\in S`:
    the name is `label`, the one item what it stands for.
    """

    text: str
    kind: str = ""
    items: tuple["Node", ...] = ()
    label: str = ""


_AND = re.compile(r",? *(?:\\text\{,? *(?:and|or) *\}|\b(?:and|or)\b) *")
_NAME = re.compile(
    r"((?:\\?[A-Za-z]+(?: [A-Z]+)?|\|[A-Z]{2}\|)(?:_\w|_\{[^{}]*\})?(?:\([a-z0-9]\))?"
    r"|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-zA-Z])) *"
)
_MATRIX = re.compile(
    r"(\[?)\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\2\}(\]?)", re.DOTALL
)
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_PAIRS = {"(": ")[", "[": "])"}


def read(text: str, *, thousands: bool = True) -> Node:
    r"""How a normal text is built. thousands: 1,234 is a number and not a pair."""
    parts = [p for p in _split(_AND.sub(",", text), ",;", thousands=thousands) if p]
    if len(parts) > 1:
        items = [read(p, thousands=False) for p in parts]
        return Node(text, "set", tuple(flat for item in items for flat in _flat(item)))
    if (found := _NAME.match(text)) and not re.search(r"[=<>]", rest := text[found.end() :]):
        return Node(text, "name", (read(rest, thousands=thousands),), found.group(1))
    if len(parts := _split(text, r"\cup")) > 1:
        return Node(text, "union", tuple(map(read, parts)))
    if found := _MATRIX.fullmatch(text):
        rows = [r for r in re.split(r"\\\\", found.group(3)) if r.strip()]
        cells = [[read(c.strip(), thousands=False) for c in r.split("&")] for r in rows]
        return Node(text, "matrix", tuple(Node("", "row", tuple(row)) for row in cells))
    if text[:1] == "{" and _closes_last(text):
        return read(text[1:-1].strip(), thousands=False)
    if text[:2] == r"\{" and _closes_last(text):
        inside = read(text[2:-2].strip(), thousands=False)
        return Node(text, "set", inside.items) if inside.kind == "set" else inside
    if text[:1] in _PAIRS and _closes_last(text):
        parts = _split(text[1:-1], ",;")
        if len(parts) > 1:
            items = [read(p.strip(), thousands=False) for p in parts]
            return Node(text, text[0] + text[-1], tuple(items))
        if text[0] + text[-1] == "()":
            return read(text[1:-1].strip(), thousands=thousands)
    if len(parts := _split(text, ":")) > 1:
        return Node(text, ":", tuple(map(read, parts)))
    if text.count(r"\pm") == 1 and r"\mp" not in text:
        signs = [re.sub(r"\\pm *", sign, text).removeprefix("+") for sign in "+-"]
        return Node(text, "set", tuple(map(read, signs)))
    return Node(text)


def _flat(item: Node) -> tuple[Node, ...]:
    r"""The items of `1\pm x` among others of a set; any other item is itself."""
    return item.items if item.kind == "set" and r"\{" not in item.text else (item,)


def _tokens(text: str) -> Iterator[tuple[int, str, int]]:
    r"""(position, token, depth of brackets there); \{ is one token, and so is a command."""
    depth = 0
    for found in re.finditer(r"\\[a-zA-Z]+|\\.|.", text):
        token = found.group()
        depth -= token in (")", "]", "}", r"\}")
        yield found.start(), token, depth
        depth += token in ("(", "[", "{", r"\{")


def _split(text: str, separators: str, *, thousands: bool = False) -> list[str]:
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


def _closes_last(text: str) -> bool:
    """Whether the bracket that opens text is closed by its end, and of a kind that may close it."""
    closed = [position for position, token, depth in _tokens(text) if depth <= 0 and position]
    if not closed or closed[0] < len(text) - (2 if text[0] == "\\" else 1):
        return False
    closing = {"{": ("}",), "\\": (r"\}",), "(": (")", "]"), "[": ("]", ")")}
    return text.endswith(closing[text[0]])
