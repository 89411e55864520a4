r"""Whether an answer equals the reference: read by `structure`, compared piece by piece.

Numbers, units, words, letters and inequalities in one letter are decided here. Only a piece that is
left over, symbolic against symbolic, goes to math-verify, in a process of its own (`algebra`).
"""

import re
from collections.abc import Callable
from fractions import Fraction

from q3mega.rewards.math.algebra import ALGEBRA
from q3mega.rewards.math.choices import Choice, choice_of_answer, choice_of_reference
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
    """(expected, answer), two pieces of LaTeX that strings cannot compare."""


def equal(reference: str, given: str) -> bool:
    """Equality in value; False when it cannot be told, or not within `algebra.TIMEOUT_S`.

    docs/rewards/mathematics.md says what counts as the same. Any thread may call it, and a fork.
    Raises RuntimeError when math-verify is needed and its process cannot start.
    """
    if len(given) > MAX_CHARACTERS or not all(c.isprintable() or c.isspace() for c in given):
        return False
    wide_digits = bool(_EAST_ASIAN_DIGIT.search(reference))
    expected = normal(reference, wide_digits=wide_digits)
    answer = normal(given, wide_digits=wide_digits)
    if expected == answer:
        return bool(answer)
    if choice := choice_of_reference(expected):
        return _same_choice(choice, answer)
    if re.fullmatch(r"[0-9]+( [0-9]+)+", expected):  # in this order: the sorting problems' answers
        return re.split(r"[ ,]+", answer.strip("[]")) == expected.split()
    tree, other = _trees(expected, answer)
    try:
        return _same(tree, other, _same_text_or_number)
    except _NeedsAlgebra:
        with ALGEBRA.session() as same:

            def leaf(expected: str, answer: str) -> bool:
                try:
                    return _same_text_or_number(expected, answer)
                except _NeedsAlgebra as question:
                    return same(*question.args)

            return _same(tree, other, leaf)


def _same_choice(choice: Choice, answer: str) -> bool:
    """The letters decide; a number beside them must not be another one. The option's text is
    enough where the reference tells it."""
    picked = choice_of_answer(answer)
    if picked is None:
        return choice.text != "" and equal(choice.text, answer)
    if picked.letters != choice.letters:
        return False
    value, other = quantity(choice.text), quantity(picked.text)
    return value is None or other is None or _same_quantity(value, other)


def _trees(expected: str, answer: str) -> tuple[Node, Node]:
    """Both as they are built; inequalities as the intervals that they leave.

    An inequality may be answered with an interval, and not the other way round: that would be the
    question said again.
    """
    if RELATION.search(expected) and (inequality := solution(expected)):
        if answer_solution := solution(answer):
            return _named(expected, *inequality), _named(answer, *answer_solution)
        if not RELATION.search(answer):
            members = solution(rf"x\in {answer}")
            return inequality[1], members[1] if members else read(answer)
    tree, other = read(expected), read(answer)
    if len(tree.items) > 1 and len(other.items) != len(tree.items):
        other = read(answer, thousands=False)  # 100,200 is two numbers where two are asked for
    return tree, other


def _named(text: str, letter: str, values: Node) -> Node:
    return Node(text, "name", (values,), letter) if letter else values


def _same(expected: Node, answer: Node, leaf: Leaf, *, named: bool = False) -> bool:
    """named: x=1, y=2 asks for both, so names may not be left out."""
    if expected.text == answer.text != "":
        return True
    if expected.label and expected.label == answer.label:
        return _same(expected.items[0], answer.items[0], leaf)
    if expected.label.startswith("(") and answer.kind == "set":
        expected = _one_by_one(expected)
    elif answer.label.startswith("(") and expected.kind == "set":
        answer = _one_by_one(answer)
    if expected.label or answer.label:
        if all(n.kind in ("", "name") and _EQUATION.search(n.text) for n in (expected, answer)):
            # y=2x+3 may be written 2x-y+3=0, but 2x=10 is not yet x=5
            solved = any(n.label and quantity(n.items[0].text) for n in (expected, answer))
            return not solved and leaf(expected.text, answer.text)
        bare, other = (n.items[0] if n.label else n for n in (expected, answer))
        return not named and _same(bare, other, leaf)
    if expected.kind == answer.kind == "":
        related = [bool(_EQUATION.search(n.text)) for n in (expected, answer)]
        return related[0] == related[1] and leaf(expected.text, answer.text)
    if expected.kind == answer.kind and len(expected.items) == len(answer.items):
        if expected.kind in ("set", "union"):
            if _matched(expected, answer, leaf):
                return True
        elif expected.kind == ":" and re.search("(?:^|:)0[0-9]", expected.text + ":" + answer.text):
            return False  # times: 3:05 is not 3:5
        elif all(_same(a, b, leaf) for a, b in zip(expected.items, answer.items, strict=True)):
            return True
    return _set_like(expected, answer) and leaf(expected.text, answer.text)


def _one_by_one(expected: Node) -> Node:
    """x=1, y=2 of (x,y)=(1,2); anything else as it is."""
    letters, values = expected.label.strip("()").split(","), expected.items[0]
    if values.kind != "()" or len(letters) != len(values.items):
        return expected
    named = (
        Node(f"{letter}={value.text}", "name", (value,), letter)
        for letter, value in zip(letters, values.items, strict=True)
    )
    return Node("", "set", tuple(named))


def _matched(expected: Node, answer: Node, leaf: Leaf) -> bool:
    """Items paired off in any order, each once."""
    roots = (re.sub(r"^x_.*", "x", item.label) for item in expected.items)  # x_1, x_2 are two x
    named = len(set(roots) - {""}) > 1
    left = list(answer.items)
    for item in expected.items:
        for other in left:
            if _same(item, other, leaf, named=named):
                left.remove(other)
                break
        else:
            return False
    return True


def _set_like(expected: Node, answer: Node) -> bool:
    """Whether two differently written sets of numbers are left to compare."""
    asked_for = expected.kind == "" and re.search(r"[<>]|\\[lg]e(?![a-z])", expected.text)
    built = expected.kind == "union" or (expected.kind == "" and r"\setminus" in expected.text)
    if answer.kind in _INTERVALS or r"\mathbb" in answer.text:
        return bool(asked_for) or built
    return built and answer.kind == "set"  # math-verify takes 1,2 for 1<x<2


def _same_text_or_number(expected: str, answer: str) -> bool:
    """Numbers, words and letters; raises _NeedsAlgebra for what else is worth asking about."""
    if expected == answer:
        return True
    if (value := quantity(expected)) is not None:
        return _same_quantity(value, quantity(answer, noun=value[1] != "", letter=value[1]))
    text = words(expected)
    if text == words(answer):
        return len(text) > 1
    if _TEXT.fullmatch(text) or _NOT_ALGEBRA.search(expected):
        if len(text) > 1 and text.casefold() == words(answer).casefold():
            return True
        if _TEXT.fullmatch(text):
            return False
    (expected, name), (answer, other_name) = map(_without_unit, (expected, answer))
    if name and other_name and not same_unit(name, other_name):
        return False
    if expected == answer or any(_is_numbers(t) for t in (expected, answer)):
        return expected == answer
    if not all(_ALGEBRA.fullmatch(t) and not _NOT_ALGEBRA.search(t) for t in (expected, answer)):
        return False
    special = {c for c in _COMMAND.findall(answer) if not _EVERYDAY.fullmatch(c)}
    if not special <= set(_COMMAND.findall(expected)):
        return False
    if answer.count("{") != answer.count("}") or answer.count("(") + answer.count("[") != (
        answer.count(")") + answer.count("]")
    ):
        return False
    raise _NeedsAlgebra(_latex(expected), _latex(answer))


def _is_numbers(text: str) -> bool:
    """A date, a score, a telephone number, a version, a range: no expression."""
    return bool(_NUMBERS.fullmatch(text) and _SIDE_BY_SIDE.search(text))


def _same_quantity(expected: tuple[Fraction, str], answer: tuple[Fraction, str] | None) -> bool:
    """The same number; a unit may be left out, another one is wrong. So may a percent sign, which
    is also worth 1/100: 50% is 50 and 1/2, and 50 is 50%, but a share of 0.5 is not 0.5%."""
    if answer is None:
        return False
    (value, name), (other, other_name) = expected, answer
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
