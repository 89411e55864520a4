"""Instruction following that a program can check: constraints on a reply, and a registry of kinds.

A constraint is a dict, `{"kind": "words", "at_least": 20}`. Its kind holds the check, the sentence
for the model and the values to draw, so that generated prompts and their rewards cannot disagree.
`constraint_counts` and `constraint_forms` have the kinds. This module has what they share.
Verifiable instructions are IFEval's idea (arXiv 2311.07911).
"""

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, NewType, get_type_hints

from q3mega.errors import UserError
from q3mega.rewards.instructions.text_units import fold, visible, words
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reward

Constraint = Mapping[str, Any]
Letter = NewType("Letter", str)
_AMOUNTS = ("at_least", "at_most", "exactly")
_COPIED = 4  # words and more are a copy of the prompt; fewer may be the answer
_TRIES = 100  # orders of the kinds; nearly always the first one already has n that go together


class Count(NamedTuple):
    """total: all that occur. credited: those that count towards a minimum, without repeats."""

    total: int
    credited: int


@dataclass(frozen=True)
class Amount:
    """The bounds of a count, both included. format(amount, "word") is "at least 20 words"."""

    low: int
    high: int | None

    @classmethod
    def of(cls, constraint: Constraint) -> "Amount":
        """The bounds that a constraint gives."""
        if "exactly" in constraint:
            return cls(constraint["exactly"], constraint["exactly"])
        return cls(constraint.get("at_least", 0), constraint.get("at_most"))

    def __format__(self, noun: str) -> str:
        bound = self.low if self.high is None else self.high
        noun = f" {noun}{'s' * (bound != 1)}" if noun else ""
        if self.high is None:
            return f"at least {self.low}{noun}"
        if self.low == self.high:
            return f"exactly {self.low}{noun}"
        return f"{f'between {self.low} and' if self.low else 'at most'} {self.high}{noun}"


@dataclass(frozen=True)
class Kind:
    """One kind of constraint.

    check(text, **parameters): a Count; or None where it is met, else what the text has instead.
    ask: the sentence for the model, with {parameters} and {amount:noun}.
    draws: the values of each parameter for generated prompts, see `kind`.
    parameters: name -> annotation.
    counts: whether `check` gives a Count.
    settles: the parts of a reply that it decides alone.
    uses: the parts that it needs left open.
    """

    check: Callable[..., Any]
    ask: str
    draws: dict[str, Sequence[Any]]
    parameters: dict[str, Any]
    counts: bool
    settles: frozenset[str]
    uses: frozenset[str]

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Parameters of a constraint, with one bound where the kind counts."""
        drawn = {name: rng.choice(self.draws[name]) for name in self.parameters}
        if self.counts:
            bound = rng.choice([name for name in _AMOUNTS if name in self.draws])
            drawn[bound] = rng.randint(*self.draws[bound])
        return drawn

    def clashes(self, other: "Kind") -> bool:
        """Whether one settles what the other settles or uses. "all" is every part of a reply."""
        return bool(
            "all" in self.settles | other.settles
            or self.settles & (other.settles | other.uses)
            or other.settles & self.uses
        )


KINDS: dict[str, Kind] = {}


def kind(
    ask: str, *, settles: str = "", uses: str = "", **draws: Sequence[Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register `f(text, **parameters)` under its own name.

    text: as a reader sees it, never blank.
    f returns None where the demand is met, else what the text has instead. Or it returns a Count,
    and then the kind has the parameters at_least, at_most and exactly. Annotations give the types
    of other parameters: int (1 or more), str, Letter, list[str], Annotated[str, choices].

    ask: the demand in English, with {parameters} and {amount:noun}.
    settles, uses: see `Kind`, as words with blanks between.
    draws: for generated prompts, the values of each parameter to choose from. For an amount its
        lowest and highest.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(fn, include_extras=True)
        parameters = {
            name: hints[name] for name in inspect.signature(fn).parameters if name != "text"
        }
        counts = hints["return"] is Count
        sets = (frozenset(settles.split()), frozenset(uses.split()))
        KINDS[fn.__name__] = Kind(fn, ask, draws, parameters, counts, *sets)
        return fn

    return register


def unmet(text: str, constraints: Sequence[Constraint]) -> list[str]:
    """One reason for each constraint that the reply does not meet, in the constraints' order."""
    text = visible(text)
    if not words(text):
        return [f"{c['kind']}: the reply is empty" for c in constraints]
    checked = ((c["kind"], _unmet(text, c)) for c in constraints)
    return [f"{name}: {failure}" for name, failure in checked if failure is not None]


def _unmet(text: str, constraint: Constraint) -> str | None:
    kind = KINDS[constraint["kind"]]
    result = kind.check(text, **{name: constraint[name] for name in kind.parameters})
    if not kind.counts:
        return result
    amount, (total, credited) = Amount.of(constraint), result
    if amount.low <= credited and (amount.high is None or total <= amount.high):
        return None
    repeats = f" ({credited} where repeats do not count)" if credited < total else ""
    return f"{total}{repeats}, {amount} asked"


def satisfies(text: str, constraint: Constraint) -> bool:
    """Whether a reply, without its thinking, meets one constraint."""
    return not unmet(text, [constraint])


def describe(constraint: Constraint) -> str:
    """The constraint as a sentence for the model: "Answer in at least 20 words." """
    kind = KINDS[constraint["kind"]]
    shown = {name: _shown(constraint[name], hint) for name, hint in kind.parameters.items()}
    return kind.ask.format(**shown, amount=Amount.of(constraint))


def _shown(value: Any, hint: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(f'"{item}"' for item in value)
    (names,) = getattr(hint, "__metadata__", ({},))
    return names[value] if isinstance(names, dict) and names else str(value)


def sample(rng: random.Random, n: int) -> list[dict[str, Any]]:
    """n constraints of different kinds that one reply can meet together.

    Raises UserError where n kinds that do not clash are not found.
    """
    for _ in range(_TRIES):
        chosen: list[str] = []
        for name in rng.sample(sorted(KINDS), len(KINDS)):
            if len(chosen) < n and not any(KINDS[name].clashes(KINDS[c]) for c in chosen):
                chosen.append(name)
        if len(chosen) == n:
            return [{"kind": name} | KINDS[name].draw(rng) for name in chosen]
    raise UserError(f"n={n} constraints that go together were not found: ask for fewer")


def check_constraints(constraints: Any) -> None:
    """Raise UserError for the first constraint that is wrong, before any compute is spent."""
    if not isinstance(constraints, list | tuple) or not constraints:
        raise UserError(
            f"constraints={constraints!r:.80} must be a list of at least one constraint"
        )
    for i, constraint in enumerate(constraints):
        where = f"constraints[{i}]"
        if not isinstance(constraint, Mapping) or "kind" not in constraint:
            raise UserError(f"{where}={constraint!r:.80} must be a mapping with a kind")
        name = constraint["kind"]
        if name not in list(KINDS):  # of a list, because the name may be unhashable
            raise UserError(f"{where}.kind={name!r:.80} is unknown: {_nearest(name, KINDS)}")
        _check_parameters(f"{where} ({name})", KINDS[name], constraint)


def _check_parameters(where: str, kind: Kind, constraint: Constraint) -> None:
    known = [*kind.parameters, *(_AMOUNTS if kind.counts else ())]
    for name, value in constraint.items():
        if name != "kind" and name not in known:
            raise UserError(f"{where}: {name}={value!r:.80} is unknown: {_nearest(name, known)}")
    for name, hint in kind.parameters.items():
        if name not in constraint:
            raise UserError(f"{where}: {name} is missing: it must be {_expected(hint)}")
        if not _is(constraint[name], hint):
            value = constraint[name]
            raise UserError(f"{where}: {name}={value!r:.80} must be {_remedy(value, hint)}")
    amounts = {name: constraint[name] for name in _AMOUNTS if name in constraint}
    for name, value in amounts.items():
        if not _is(value, int):
            raise UserError(f"{where}: {name}={value!r:.80} must be {_expected(int)}")
    if kind.counts and not amounts:
        raise UserError(f"{where}: no amount is given: add at_least, at_most or exactly")
    if "exactly" in amounts and len(amounts) > 1:
        raise UserError(f"{where}: exactly={amounts['exactly']} stands alone: take the others out")
    if amounts.get("at_least", 0) > amounts.get("at_most", float("inf")):
        low, high = amounts["at_least"], amounts["at_most"]
        raise UserError(f"{where}: at_least={low} is over at_most={high}: lower it")


def _is(value: Any, hint: Any) -> bool:
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if hint == list[str]:
        return isinstance(value, list | tuple) and bool(value) and all(_is(v, str) for v in value)
    if not isinstance(value, str) or not fold(visible(value)):
        return False
    if hint is Letter:
        return len(value) == 1 and value.isalpha()
    return hint is str or value in hint.__metadata__[0]


_EXPECTED: dict[Any, str] = {
    int: "a whole number of at least 1",
    str: "a text that is not blank",
    Letter: "one letter",
    list[str]: "a list of texts, none of them blank",
}


def _expected(hint: Any) -> str:
    choices = getattr(hint, "__metadata__", None)
    return f"one of {', '.join(choices[0])}" if choices else _EXPECTED[hint]


def _remedy(value: Any, hint: Any) -> str:
    """What is wanted; of many choices, the nearest one, by its name too (de, German)."""
    choices = getattr(hint, "__metadata__", ((),))[0]
    names = {choice.casefold(): choice for choice in choices}
    if isinstance(choices, dict):
        names |= {name.casefold(): choice for choice, name in choices.items()}
    near = get_close_matches(str(value).casefold(), names, n=1)
    return _expected(hint) + (f"; did you mean {names[near[0]]!r}?" if near else "")


def _nearest(name: Any, names: Any) -> str:
    near = get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}"


def _check_row(row: Mapping[str, Any]) -> None:
    check_constraints(row.get("constraints"))


@reward("constraints", needs=_check_row)
def constraints(completion: str, row: Mapping[str, Any]) -> Verdict:
    """The share of row["constraints"] that the reply after the thinking meets."""
    demands = row["constraints"]
    text = reply(completion)
    if text is None:
        return Verdict(0.0, "think block malformed or never closed")
    if _copied(text, row):
        return Verdict(0.0, "nothing but the instruction again")
    reasons = unmet(text, demands)
    share = 1 - len(reasons) / len(demands)
    return Verdict(share, reasons[0] if reasons else f"all {len(demands)} met")


@reward("constraints_strict", needs=_check_row)
def constraints_strict(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 when the reply meets all of row["constraints"]: IFEval's strict accuracy of prompts."""
    verdict = constraints(completion, row)
    return Verdict(float(verdict.score == 1), verdict.reason)


def _copied(text: str, row: Mapping[str, Any]) -> bool:
    """Whether no word is left of the reply once the prompt and its demands are taken out of it."""
    text = fold(visible(text))
    if not words(text):
        return False
    messages = row.get("messages") or [{"content": ""}]
    question = fold(messages[-1]["content"])
    demands = [fold(describe(c)) for c in row["constraints"]]
    for demand in demands:
        question = question.replace(demand, "")
    for piece in (*demands, " ".join(question.split())):
        if len(words(piece)) >= _COPIED:
            text = text.replace(piece, "")
    return not words(text)
