r"""Whether an answer equals the reference: read by `structure`, compared piece by piece.

Numbers, units, words, letters and inequalities in one letter are decided here. Only a piece that is
left over, symbolic against symbolic, goes to math-verify, in a process of its own (`algebra`).
"""

import re
from collections.abc import Callable
from fractions import Fraction

from q3mega.rewards.math.algebra import ALGEBRA
from q3mega.rewards.math.choices import Choice, asked, chosen
from q3mega.rewards.math.inequalities import RELATION, solution
from q3mega.rewards.math.notation import CJK, MAX_CHARACTERS, normal, words
from q3mega.rewards.math.quantities import quantity, same_unit, unit
from q3mega.rewards.math.structure import THOUSANDS, Node, read

# What an answer may use besides the commands of its reference: a sum, an integral, a binomial or a
# factorial that is not in the reference is the question said again.
_EVERYDAY = re.compile(
    r"\\(?:frac|sqrt|pi|cdot|times|infty|pm|sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|sinh|cosh"
    r"|tanh|ln|log|exp|le|ge|ne|cup|in|setminus|mathbb|emptyset|alpha|beta|gamma|theta|lambda|phi"
    r"|omega|[{}])"
)
_COMMAND = re.compile(r"\\[a-zA-Z]+|\\.|!")
_EQUATION = re.compile(rf"=|{RELATION.pattern}")
_ALGEBRA = re.compile(r"[A-Za-z0-9+\-*/^_=<>().,|!'\\{}\[\] ]+")
# Words, periods, numbers in another base.
_NOT_ALGEBRA = re.compile(
    r"\\text|\\overline|(?<!\\)\b[A-Za-z]{4,}|[0-9]_|__"
    r"|(?<![A-Za-z\\])[A-Za-z]{2,} [0-9A-Za-z]|[0-9)}] [A-Za-z]{2,}"
)
# Dates, scores, telephone numbers, versions, ranges, dimensions: numbers side by side are no sum.
_NUMBERS = re.compile(r"(?:\(?\+)?[0-9 ./()\-]*|[0-9.]+(?:\\times[0-9.]+)+")
_SIDE_BY_SIDE = re.compile(
    r"[0-9)] ?-+ ?[(0-9]|/[0-9]+/|\.[0-9]*\.|[0-9)] +[(0-9]|\)[(0-9]|[0-9]\(|\\times"
)
_TEXT = re.compile(r"[^\W\d_]+(?:[ '-]+[^\W\d_]+)*")
_UNIT_BEHIND = re.compile(
    rf"(.+?)((?: ?\\text\{{[^{{}}]*\}}| [A-Za-z]{{2}}[A-Za-z ]*| ?[{CJK}][{CJK}/]*)(?:\^[0-9])?)"
)
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_EAST_ASIAN_DIGIT = re.compile("[\uff10-\uff19]")

_INTERVALS = "()", "(]", "[)", "[]", "union"

Leaf = Callable[[str, str], bool]


class _NeedsAlgebra(Exception):
    """(wanted, found), two pieces of LaTeX that strings cannot compare."""


def equal(reference: str, given: str) -> bool:
    """Equality in value; False when it cannot be told, or not within `algebra.TIMEOUT_S`.

    docs/rewards/mathematics.md says what counts as the same. Any thread may call it, and a fork.
    Raises RuntimeError when math-verify is needed and its process cannot start.
    """
    if len(given) > MAX_CHARACTERS or not all(c.isprintable() or c.isspace() for c in given):
        return False
    wide_digits = bool(_EAST_ASIAN_DIGIT.search(reference))
    wanted = normal(reference, wide_digits=wide_digits)
    found = normal(given, wide_digits=wide_digits)
    if wanted == found:
        return bool(found)
    if choice := asked(wanted):
        return _chosen(choice, found)
    if re.fullmatch(r"[0-9]+( [0-9]+)+", wanted):  # in this order: the sorting problems' answers
        return re.split(r"[ ,]+", found.strip("[]")) == wanted.split()
    tree, other = _trees(wanted, found)
    try:
        return _same(tree, other, _plainly)
    except _NeedsAlgebra:
        with ALGEBRA.session() as same:

            def leaf(wanted: str, found: str) -> bool:
                try:
                    return _plainly(wanted, found)
                except _NeedsAlgebra as question:
                    return same(*question.args)

            return _same(tree, other, leaf)


def _chosen(choice: Choice, answer: str) -> bool:
    """The letters decide; a number beside them must not be another one. The option's text is
    enough where the reference tells it."""
    picked = chosen(answer)
    if picked is None:
        return choice.text != "" and equal(choice.text, answer)
    if picked.letters != choice.letters:
        return False
    value, other = quantity(choice.text), quantity(picked.text)
    return value is None or other is None or _same_quantity(value, other)


def _trees(wanted: str, found: str) -> tuple[Node, Node]:
    """Both as they are built; inequalities as the intervals that they leave.

    An inequality may be answered with an interval, and not the other way round: that would be the
    question said again.
    """
    if RELATION.search(wanted) and (inequality := solution(wanted)):
        if answer := solution(found):
            return _named(wanted, *inequality), _named(found, *answer)
        if not RELATION.search(found):
            members = solution(rf"x\in {found}")
            return inequality[1], members[1] if members else read(found)
    tree, other = read(wanted), read(found)
    if len(tree.items) > 1 and len(other.items) != len(tree.items):
        other = read(found, thousands=False)  # 100,200 is two numbers where two are asked for
    return tree, other


def _named(text: str, letter: str, values: Node) -> Node:
    return Node(text, "name", (values,), letter) if letter else values


def _same(wanted: Node, found: Node, leaf: Leaf, *, named: bool = False) -> bool:
    """named: x=1, y=2 asks for both, so names may not be left out."""
    if wanted.text == found.text != "":
        return True
    if wanted.label and wanted.label == found.label:
        return _same(wanted.items[0], found.items[0], leaf)
    if wanted.label.startswith("(") and found.kind == "set":
        wanted = _one_by_one(wanted)
    elif found.label.startswith("(") and wanted.kind == "set":
        found = _one_by_one(found)
    if wanted.label or found.label:
        if all(n.kind in ("", "name") and _EQUATION.search(n.text) for n in (wanted, found)):
            # y=2x+3 may be written 2x-y+3=0, but 2x=10 is not yet x=5
            solved = any(n.label and quantity(n.items[0].text) for n in (wanted, found))
            return not solved and leaf(wanted.text, found.text)
        bare, other = (n.items[0] if n.label else n for n in (wanted, found))
        return not named and _same(bare, other, leaf)
    if wanted.kind == found.kind == "":
        related = [bool(_EQUATION.search(n.text)) for n in (wanted, found)]
        return related[0] == related[1] and leaf(wanted.text, found.text)
    if wanted.kind == found.kind and len(wanted.items) == len(found.items):
        if wanted.kind in ("set", "union"):
            if _matched(wanted, found, leaf):
                return True
        elif wanted.kind == ":" and re.search("(?:^|:)0[0-9]", wanted.text + ":" + found.text):
            return False  # times: 3:05 is not 3:5
        elif all(_same(a, b, leaf) for a, b in zip(wanted.items, found.items, strict=True)):
            return True
    return _set_like(wanted, found) and leaf(wanted.text, found.text)


def _one_by_one(wanted: Node) -> Node:
    """x=1, y=2 of (x,y)=(1,2); anything else as it is."""
    letters, values = wanted.label.strip("()").split(","), wanted.items[0]
    if values.kind != "()" or len(letters) != len(values.items):
        return wanted
    named = (
        Node(f"{letter}={value.text}", "name", (value,), letter)
        for letter, value in zip(letters, values.items, strict=True)
    )
    return Node("", "set", tuple(named))


def _matched(wanted: Node, found: Node, leaf: Leaf) -> bool:
    """Items paired off in any order, each once."""
    roots = (re.sub(r"^x_.*", "x", item.label) for item in wanted.items)  # x_1, x_2 are two x
    named = len(set(roots) - {""}) > 1
    left = list(found.items)
    for item in wanted.items:
        for other in left:
            if _same(item, other, leaf, named=named):
                left.remove(other)
                break
        else:
            return False
    return True


def _set_like(wanted: Node, found: Node) -> bool:
    """Whether two differently written sets of numbers are left to compare."""
    asked_for = wanted.kind == "" and re.search(r"[<>]|\\[lg]e(?![a-z])", wanted.text)
    built = wanted.kind == "union" or (wanted.kind == "" and r"\setminus" in wanted.text)
    if found.kind in _INTERVALS or r"\mathbb" in found.text:
        return bool(asked_for) or built
    return built and found.kind == "set"  # math-verify takes 1,2 for 1<x<2


def _plainly(wanted: str, found: str) -> bool:
    """Numbers, words and letters; raises _NeedsAlgebra for what else is worth asking about."""
    if wanted == found:
        return True
    if (value := quantity(wanted)) is not None:
        return _same_quantity(value, quantity(found, noun=value[1] != "", letter=value[1]))
    text = words(wanted)
    if text == words(found):
        return len(text) > 1
    if _TEXT.fullmatch(text) or _NOT_ALGEBRA.search(wanted):
        if len(text) > 1 and text.casefold() == words(found).casefold():
            return True
        if _TEXT.fullmatch(text):
            return False
    (wanted, name), (found, other_name) = map(_without_unit, (wanted, found))
    if name and other_name and not same_unit(name, other_name):
        return False
    if wanted == found or any(_is_numbers(t) for t in (wanted, found)):
        return wanted == found
    if not all(_ALGEBRA.fullmatch(t) and not _NOT_ALGEBRA.search(t) for t in (wanted, found)):
        return False
    special = {c for c in _COMMAND.findall(found) if not _EVERYDAY.fullmatch(c)}
    if not special <= set(_COMMAND.findall(wanted)):
        return False
    if found.count("{") != found.count("}") or found.count("(") + found.count("[") != (
        found.count(")") + found.count("]")
    ):
        return False
    raise _NeedsAlgebra(_latex(wanted), _latex(found))


def _is_numbers(text: str) -> bool:
    """A date, a score, a telephone number, a version, a range: no expression."""
    return bool(_NUMBERS.fullmatch(text) and _SIDE_BY_SIDE.search(text))


def _same_quantity(wanted: tuple[Fraction, str], found: tuple[Fraction, str] | None) -> bool:
    """The same number; a unit may be left out, another one is wrong. So may a percent sign, which
    is also worth 1/100: 50% is 50 and 1/2, and 50 is 50%, but a share of 0.5 is not 0.5%."""
    if found is None:
        return False
    (value, name), (other, other_name) = wanted, found
    if name == "%" and other_name == "":
        return other in (value, value / 100)
    if name == "" and other_name == "%":
        return other == 100 * value or (other == value and value > 1)
    return value == other and (name == "" or other_name == "" or same_unit(name, other_name))


def _without_unit(text: str) -> tuple[str, str]:
    r"""('2\pi', 'cm') of '2\pi\text{ cm}'."""
    match = _UNIT_BEHIND.fullmatch(text)
    name = unit(match.group(2), noun=False) if match else None
    return (match.group(1), name) if match and name else (text, "")


def _latex(text: str) -> str:
    """For math-verify: decimals as fractions, since it would round them."""
    exact = _DECIMAL.sub(lambda d: rf"{{\frac{{{d[1]}{d[2]}}}{{1{'0' * len(d[2])}}}}}", text)
    return THOUSANDS.sub("", exact) if "," in exact else exact
