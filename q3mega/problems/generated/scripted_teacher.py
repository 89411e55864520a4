r"""The teacher of the cold start: a scripted stand-in for QwQ-32B, at laptop scale.

The Qwen3 report samples N candidates a query from QwQ-32B and keeps what passes six rules. Here a
script writes the candidates, mostly sound ones, and the rest with one of the six flaws that the
rules exist for. `Candidate.flaw` is for measuring the filter (`q3mega.problems.query_filters`),
which only ever sees the text. So that the query filter has work too, there are queries no one
should train on.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from q3mega.problems.base import Problem, generate, problem
from q3mega.problems.generated.solutions import Solution, response_text, solve, thinking_text

SLIP = 0.3
HUNCHES = ("I think it is {}.", "It must be {}, I am sure.", "Maybe {}?", "")
ASIDES = (
    "also gut, wir rechnen weiter",
    "und jetzt das nächste",
    "das ist noch nicht fertig",
    "所以我们继续",
    "接下来是这一步",
    "好的，再看",
)
TOPICS = ("the sea", "a red house", "your best day", "the number 7", "winter", "an old clock")
OPENINGS = ("Write about {}.", "Tell me a story about {}.", "Describe {} in your own words.")
JOINS = ("{} {}", "{} Also: {}", "First: {} Second: {}")


@dataclass(frozen=True)
class Candidate:
    """One answer of the teacher; flaw is None for a sound one, otherwise the rule it breaks."""

    thinking: str
    response: str
    flaw: str | None


def _sound(query: Problem, rng: random.Random) -> Candidate:
    right = solve(query)
    return Candidate(thinking_text(right), response_text(right, rng), None)


def _slipped(query: Problem, rng: random.Random) -> Solution:
    """A solution with a wrong answer; a list of one repeated digit has none and stays right."""
    tries = (solve(query, rng=rng, slip=SLIP) for _ in range(100))
    return next((s for s in tries if not s.correct), solve(query))


def _flawed(
    flaw: str, query: Problem, rng: random.Random, validation: Sequence[Problem]
) -> Candidate:
    right = solve(query)
    steps, response = list(right.steps), response_text(right, rng)
    if flaw == "wrong_answer":
        wrong = _slipped(query, rng)
        steps, response = wrong.steps, response_text(wrong, rng)
    elif flaw == "repetition":
        loop = rng.choice((steps, steps[-1:]))
        steps += loop * (2 * len(steps) // len(loop))
    elif flaw == "guess":
        steps = [rng.choice(HUNCHES).format(right.answer)]
    elif flaw == "disagreement":
        steps = _slipped(query, rng).steps
    elif flaw == "language_mixing":
        for aside in rng.sample(ASIDES, 2):
            steps.insert(rng.randrange(len(steps)), aside)
    elif flaw == "validation_copy":
        copied = rng.choice(validation)
        steps = [copied.question, *solve(copied).steps, *steps]
    return Candidate("\n".join(steps), response, flaw)


FLAWS = (
    "wrong_answer",
    "repetition",
    "guess",
    "disagreement",
    "language_mixing",
    "validation_copy",
)


def candidates(
    query: Problem, n: int, seed: int, validation: Sequence[Problem] = (), flawed: float = 0.4
) -> list[Candidate]:
    """n answers of the teacher to one query, `flawed` of them with one of the six flaws.

    A flaw that a query cannot show (no held-out item to copy, no step to slip in) is not drawn.
    """
    rng = random.Random(f"tutor/{query.id}/{seed}")
    flaws = FLAWS if validation else FLAWS[:-1]
    return [
        _flawed(rng.choice(flaws), query, rng, validation)
        if rng.random() < flawed
        else _sound(query, rng)
        for _ in range(n)
    ]


def unsuitable_queries(n: int, seed: int) -> list[Problem]:
    """Queries that the query filter must drop: two questions in one, or nothing to verify."""
    rng = random.Random(f"unsuitable/{seed}")
    parts = generate("chain_sum", 2 * n, seed=seed)
    out = []
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        if rng.random() < 0.5:
            text = rng.choice(JOINS).format(first.question, second.question)
            out.append(problem("joined", "reasoning", text, first.answer, 1))
        else:
            text = rng.choice(OPENINGS).format(rng.choice(TOPICS))
            out.append(problem("open", "reasoning", text, "", 1))
    return out
