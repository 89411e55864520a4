"""Problems, families of problems, and the split that keeps one in ten of them for evaluation.

A family draws one `Problem` from a random generator and a difficulty. Everything else
(distinctness, the held-out side, reproducibility) is decided here, once, from a hash of the
problem's text, so that no stage can train on what another one evaluates on.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from q3mega.errors import UserError

Row = dict[str, Any]  # of an evaluation set: messages, reward, and what that reward reads
HELDOUT_ONE_IN = 10


@dataclass(frozen=True)
class Problem:
    """One query with what its reward needs to judge an answer.

    id: 16 hex digits of SHA-256 over family and messages; the same text has the same id.
    messages: chat messages up to and including the user turn, without thinking flags.
    answer: the reference answer, "" where there is none.
    """

    id: str
    family: str
    capability: str
    messages: tuple[dict[str, Any], ...]
    answer: str
    difficulty: int
    meta: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def heldout(self) -> bool:
        """True for one id in ten: these are for evaluation only."""
        return int(self.id, 16) % HELDOUT_ONE_IN == 0

    @property
    def row(self) -> dict[str, Any]:
        """What a reward reads: the fields, beside what the line of a file says (meta)."""
        return self.meta | vars(self)

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        return self.messages[-1]["content"]


Make = Callable[[random.Random, int], Problem]


@dataclass(frozen=True)
class Family:
    """A kind of problem: `make(rng, difficulty)` draws one, for a difficulty in `difficulties`."""

    capability: str
    make: Make
    difficulties: range


FAMILIES: dict[str, Family] = {}


def family(name: str, *, capability: str, difficulties: range) -> Callable[[Make], Make]:
    """Decorator: register `make(rng, difficulty) -> Problem` as the family `name`."""

    def register(make: Make) -> Make:
        FAMILIES[name] = Family(capability, make, difficulties)
        return make

    return register


def problem(
    family: str,
    capability: str,
    messages: str | Sequence[dict[str, Any]],
    answer: str,
    difficulty: int,
    *,
    meta: Mapping[str, Any] | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> Problem:
    """A Problem with its id. A plain string is one user turn."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    text = json.dumps([family, *messages], sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    turns = tuple(messages)
    return Problem(
        identity, family, capability, turns, answer, difficulty, dict(meta or {}), tuple(tools)
    )


def generate(
    family: str,
    n: int,
    *,
    seed: int,
    heldout: bool = False,
    difficulty: tuple[int, int] | None = None,
) -> list[Problem]:
    """n distinct problems of one side of the split, the same ones for the same arguments.

    difficulty: lowest and highest, both included; the family's whole range by default. It is drawn
    uniformly, so the easy end, where fewer problems exist, thins out as n grows. A larger n
    continues the list of a smaller one.
    Raises UserError for an unknown family, a difficulty outside its range, or too large an n.
    """
    if family not in FAMILIES:
        raise UserError(f"family={family!r} is unknown; known: {', '.join(sorted(FAMILIES))}")
    spec = FAMILIES[family]
    low, high = difficulty or (spec.difficulties[0], spec.difficulties[-1])
    if low > high or low not in spec.difficulties or high not in spec.difficulties:
        lowest, highest = spec.difficulties[0], spec.difficulties[-1]
        raise UserError(
            f"difficulty={(low, high)} of {family}: give a range in {lowest}..{highest}"
        )
    rng = random.Random(f"{family}/{seed}/{heldout}/{low}/{high}")
    by_id: dict[str, Problem] = {}
    stale = 0
    while len(by_id) < n:
        drawn = spec.make(rng, rng.randint(low, high))
        if drawn.heldout != heldout or drawn.id in by_id:
            stale += 1
            # Coupon collecting: many times more draws in vain than problems exist: none are left.
            if stale > 1000 + 30 * len(by_id) * (HELDOUT_ONE_IN if heldout else 1):
                side = "held out" if heldout else "for training"
                raise UserError(
                    f"n={n}: {family} at difficulty {low}..{high} has only {len(by_id)} distinct "
                    f"problems {side}; ask for fewer or widen the difficulty"
                )
            continue
        stale = 0
        by_id[drawn.id] = drawn
    return list(by_id.values())
