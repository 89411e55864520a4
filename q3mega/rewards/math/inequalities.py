r"""Inequalities in one letter as the intervals that they leave: `x<0 \text{ or } x>1`, `x\ne1`.

Bounds are compared where they are numbers; where that would need algebra, nothing is concluded.
"""

import re
from dataclasses import dataclass

from q3mega.rewards.math.quantities import value_of
from q3mega.rewards.math.structure import AND, OR, Node, read, split, such_that

RELATION = re.compile(r"<|>|\\(?:le|ge|ne)(?![a-zA-Z])")
_SIGN = re.compile(r"<|>|=|\\(?:le|ge|ne|in)(?![a-zA-Z])")
_LETTER = re.compile(
    r"(?!\\(?:pi|infty)(?![a-z]))(?:[A-Za-z]|\\[a-z]+)(?:_\w|_\{\w+\})?(?:\([a-z]\))?"
)
_UP, _DOWN = {">", r"\ge"}, {"<", r"\le"}
MAX_INTERVALS = 24  # more are no answer, and would only cost time
_UNKNOWNS = "xyzt"
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne", "=": "="}
_LEAST, _MOST = r"-\infty", r"\infty"


class _Unclear(Exception):
    """What is no inequality in one letter, or would have to be solved."""


@dataclass(frozen=True)
class _Interval:
    low: str
    has_low: bool
    high: str
    has_high: bool


_Region = list[_Interval]
_LINE = [_Interval(_LEAST, False, _MOST, False)]


def solution(text: str) -> tuple[str, Node] | None:
    r"""('x', the interval or union) of inequalities in x, written as in `x>1`, `1<x\le2`, `x\ne1`
    or `x\in S`, joined by "or", "and", commas, or in \{x|...\}, whose letter is not told. None for
    all else."""
    bound = such_that(text)
    try:
        letters, region = _alternatives(bound[1] if bound else text)
        region = _ordered(region)
    except _Unclear:
        return None
    if len(letters) != 1:
        return None
    return "" if bound else letters.pop(), _node(region)


def _alternatives(text: str) -> tuple[set[str], _Region]:
    """The letters in any of the conditions and what all alternatives leave."""
    letters: set[str] = set()
    alternatives: list[list[_Region]] = []
    for alternative in split(OR.sub(r"\\vee ", text), r"\vee"):
        drawn = [_condition(condition) for condition in _conditions(alternative)]
        letters |= {letter for letter, _ in drawn}
        alternatives.append([region for _, region in drawn])
    if len(alternatives) == 1 and not AND.search(text) and _apart(alternatives[0]):
        alternatives = [[region] for region in alternatives[0]]  # x<0, x>1
    return letters, [i for regions in alternatives for i in _intersection(regions)]


def _conditions(text: str) -> list[str]:
    r"""Those that hold at once; x\ne1,2 is x\ne1,x\ne2."""
    conditions: list[str] = []
    for both in split(AND.sub(r"\\wedge ", text), r"\wedge"):
        for part in filter(None, split(both, ",;")):
            head, sign, _ = conditions[-1].partition(r"\ne") if conditions else ("", "", "")
            bare = sign and not _SIGN.search(part)
            conditions.append(f"{head}{sign} {part}" if bare else part)
    return conditions


def _condition(text: str) -> tuple[str, _Region]:
    signs = [m.group() for m in _SIGN.finditer(text)]
    sides = [side.strip() for side in _SIGN.split(text)]
    is_letter = [bool(_LETTER.fullmatch(side)) for side in sides]
    if signs == [r"\in"] and is_letter[0]:
        return sides[0], _members(read(sides[1]))
    if len(signs) == 2 and is_letter[1] and sides[1] not in sides[::2]:
        below, above = _FLIPPED.get(signs[0], ""), signs[1]
        if {(below in _UP), (above in _UP)} == {True, False} and {below, above} <= _UP | _DOWN:
            return sides[1], _intersection(
                [_one_sided(below, sides[0]), _one_sided(above, sides[2])]
            )
    if len(signs) == 1 and all(is_letter):  # of x>a the unknown is x
        is_letter = [side in _UNKNOWNS for side in sides]
    if len(signs) == 1 and signs[0] in _FLIPPED and is_letter[0] != is_letter[1]:
        sign = signs[0] if is_letter[0] else _FLIPPED[signs[0]]
        letter, bound = sides if is_letter[0] else sides[::-1]
        return letter, _one_sided(sign, bound)
    raise _Unclear


def _one_sided(sign: str, bound: str) -> _Region:
    bounds = read(bound)
    points = [item.text for item in bounds.items] if bounds.kind == "set" else [bounds.text]
    if sign == r"\ne":
        return _intersection([_without(point) for point in points])
    if not bound or (len(points) > 1 and sign != "="):
        raise _Unclear
    match sign:
        case "=":
            return [_Interval(point, True, point, True) for point in points]
        case "<" | r"\le":
            return [_Interval(_LEAST, False, bound, sign != "<")]
        case _:
            return [_Interval(bound, sign != ">", _MOST, False)]


def _without(point: str) -> _Region:
    return [_Interval(_LEAST, False, point, False), _Interval(point, False, _MOST, False)]


def _members(values: Node) -> _Region:
    r"""Of an interval, a union, \mathbb{R} and that without points."""
    if values.kind == "union":
        return [interval for item in values.items for interval in _members(item)]
    if values.kind in ("()", "(]", "[)", "[]") and len(values.items) == 2:
        low, high = (item.text for item in values.items)
        return [_Interval(low, values.kind[0] == "[", high, values.kind[1] == "]")]
    if values.kind == "set" and values.text.startswith(r"\{"):
        return [_Interval(item.text, True, item.text, True) for item in values.items]
    if values.text.startswith(r"\mathbb{R}"):
        removed = re.sub(r"^(?:\\setminus|-)", "", values.text.removeprefix(r"\mathbb{R}"))
        if not removed:
            return _LINE
        if removed.startswith(r"\{"):
            return _one_sided(r"\ne", removed)
    raise _Unclear


def _above(bound: str, other: str) -> bool:
    """Whether a bound is greater; raises _Unclear where that is not seen."""
    if bound in (other, _LEAST) or other == _MOST:
        return False
    if bound == _MOST or other == _LEAST:
        return True
    value, other_value = value_of(bound), value_of(other)
    if value is None or other_value is None:
        raise _Unclear
    return value > other_value


def _same_bound(bound: str, other: str) -> bool:
    return not _above(bound, other) and not _above(other, bound)


def _meet(a: _Interval, b: _Interval) -> _Region:
    if _same_bound(a.low, b.low):
        low, has_low = a.low, a.has_low and b.has_low
    else:
        low, has_low = (a.low, a.has_low) if _above(a.low, b.low) else (b.low, b.has_low)
    if _same_bound(a.high, b.high):
        high, has_high = a.high, a.has_high and b.has_high
    else:
        high, has_high = (b.high, b.has_high) if _above(a.high, b.high) else (a.high, a.has_high)
    try:
        empty = _above(low, high) or (_same_bound(low, high) and not (has_low and has_high))
    except _Unclear:
        empty = False  # a<x<b, whatever a and b are
    return [] if empty else [_Interval(low, has_low, high, has_high)]


def _intersection(regions: list[_Region]) -> _Region:
    left = _LINE
    for region in regions:
        if len(left) * len(region) > MAX_INTERVALS:
            raise _Unclear
        left = [piece for a in left for b in region for piece in _meet(a, b)]
    return left


def _apart(regions: list[_Region]) -> bool:
    """Whether conditions with a mere comma between them cannot hold at once."""
    try:
        return len(regions) > 1 and not _intersection(regions)
    except _Unclear:
        return False


def _ordered(region: _Region) -> _Region:
    """The intervals from left to right, those that touch joined; as they are if that is unclear."""
    left_to_right: _Region = []
    if len(region) > MAX_INTERVALS:
        raise _Unclear
    try:
        for interval in region:
            position = sum(_above(interval.low, other.low) for other in left_to_right)
            left_to_right.insert(position, interval)
        joined: _Region = []
        for interval in left_to_right:
            if joined and _touch(joined[-1], interval):
                joined[-1] = _union(joined[-1], interval)
            else:
                joined.append(interval)
        return joined
    except _Unclear:
        return region


def _touch(left: _Interval, right: _Interval) -> bool:
    if _same_bound(right.low, left.high):
        return right.has_low or left.has_high
    return _above(left.high, right.low)


def _union(left: _Interval, right: _Interval) -> _Interval:
    """Of two that touch, the left one beginning first, or with the other."""
    has_low = left.has_low or (right.has_low and _same_bound(left.low, right.low))
    if _same_bound(left.high, right.high):
        return _Interval(left.low, has_low, left.high, left.has_high or right.has_high)
    last = left if _above(left.high, right.high) else right
    return _Interval(left.low, has_low, last.high, last.has_high)


def _node(region: _Region) -> Node:
    if not region:
        return Node(r"\emptyset")
    pieces = [_piece(interval) for interval in region]
    texts = [p.text if p.kind or "mathbb" in p.text else rf"\{{{p.text}\}}" for p in pieces]
    return pieces[0] if len(pieces) == 1 else Node(r"\cup".join(texts), "union", tuple(pieces))


def _piece(interval: _Interval) -> Node:
    low, high = read(interval.low), read(interval.high)
    if interval == _LINE[0]:
        return Node(r"\mathbb{R}")
    if interval.low == interval.high:
        return low
    opening, closing = "[" if interval.has_low else "(", "]" if interval.has_high else ")"
    text = f"{opening}{interval.low},{interval.high}{closing}"
    return Node(text, opening + closing, (low, high))
