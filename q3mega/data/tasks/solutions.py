r"""Worked solutions, one line a step, with human slips on request; and the check of an answer.

A slip replaces the right result of one step by a wrong one, and everything after it follows from
the wrong result: text like this teaches a base model the method and leaves reinforcement learning
something to do. Every line states what the next line needs, so no step looks back further than the
question and the line above.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from q3mega.data.tasks.base import Problem
from q3mega.errors import UserError

# result(right, alternatives) is `right`, or now and then one of the alternatives: the slip.
Result = Callable[[str, list[str]], str]
# Fields of the lines, in the order of the work; the generator returns the answer they lead to.
Work = Iterator[dict[str, str]]


@dataclass(frozen=True)
class Solution:
    """Worked steps (one line each), the answer they lead to, and whether it is right."""

    steps: list[str]
    answer: str
    correct: bool


def _near(value: int) -> list[str]:
    return [str(wrong) for wrong in (value - 2, value - 1, value + 1, value + 2) if wrong >= 0]


def _chain_sum(problem: Problem, result: Result) -> Work:
    numbers, signs = problem.meta["numbers"], problem.meta["signs"]
    total = numbers[0]
    for number, sign in zip(numbers[1:], signs[1:], strict=True):
        right = total + number if sign == "+" else total - number
        outcome = result(str(right), _near(right))
        yield {"work": f"{total}{sign}{number}", "result": outcome, "answer": outcome}
        total = int(outcome)


def _to_decimal(problem: Problem, result: Result) -> Work:
    value, *bits = map(int, problem.meta["bits"])
    yield {"work": str(value), "result": str(value), "answer": str(value)}
    for bit in bits:
        right = value + value + bit
        outcome = result(str(right), _near(right))
        yield {"work": f"{value}+{value}+{bit}", "result": outcome, "answer": outcome}
        value = int(outcome)


def _to_base_4(problem: Problem, result: Result) -> Work:
    bits = problem.meta["bits"]
    digits = ""
    for pair in (bits[i : i + 2] for i in range(0, len(bits), 2)):
        right = str(int(pair, 2))
        digits += result(right, [d for d in "0123" if d != right])
        yield {"work": pair, "result": digits, "answer": digits}


def _number_sorting(problem: Problem, result: Result) -> Work:
    rest = [str(number) for number in problem.meta["numbers"]]
    picked: list[str] = []
    while rest:
        right = min(rest)
        picked.append(result(right, [number for number in rest if number != right]))
        rest.remove(picked[-1])
        yield {"work": picked[-1], "result": " ".join(rest), "answer": " ".join(picked)}


TAKE = "take {work} get {result}"
# What does the work, and its lines in three surface styles.
METHODS: dict[str, tuple[Callable[[Problem, Result], Work], tuple[str, str, str]]] = {
    "chain_sum": (_chain_sum, ("{work}={result}", "{work} is {result}", TAKE)),
    "base_conversion/10": (_to_decimal, ("{work}={result}", "{work} is {result}", TAKE)),
    "base_conversion/4": (_to_base_4, ("{work}:{result}", "{work} makes {result}", TAKE)),
    "number_sorting": (
        _number_sorting,
        ("{work}:{result}", "{work} then {result}", "take {work} left {result}"),
    ),
}


def solve(
    problem: Problem, *, rng: random.Random | None = None, slip: float = 0.0, style: int = 0
) -> Solution:
    """The worked solution of a problem of the reasoning families.

    slip: probability of a wrong result in each step; it needs `rng`. style: 0, 1 or 2.
    Raises UserError where there is no method for the family, or an argument is out of range.
    """
    key = problem.family
    if key == "base_conversion":
        key += f"/{problem.meta['base']}"
    if key not in METHODS:
        raise UserError(f"family={key!r} has no worked solution; solvable: {', '.join(METHODS)}")
    work, styles = METHODS[key]
    if not 0 <= style < len(styles):
        raise UserError(f"style={style}: give 0..{len(styles) - 1}")
    if not 0 <= slip <= 1 or (slip and rng is None):
        raise UserError(f"slip={slip}: give a probability, and with it a random generator (rng)")

    def result(right: str, alternatives: list[str]) -> str:
        if rng is not None and alternatives and rng.random() < slip:
            return rng.choice(alternatives)
        return right

    lines, answer = [], ""
    for fields in work(problem, result):
        lines.append(styles[style].format(**fields).strip())
        answer = fields["answer"]
    return Solution(lines, answer, check(problem, answer))


def thinking_text(solution: Solution) -> str:
    """What goes between the think tags."""
    return "\n".join(solution.steps)


def response_text(solution: Solution) -> str:
    r"""What the user reads: 'The answer is \boxed{10}.'"""
    return rf"The answer is \boxed{{{solution.answer}}}."


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} without inner braces, or None."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1].strip() if found else None


@cache
def _reasoning_gym(family: str) -> Callable[[str, dict[str, str]], float]:
    # Imported at first use: it takes over a second, and most answers match exactly.
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(family)


def check(problem: Problem, answer: str) -> bool:
    """Is this answer (the content of the box) right? Without a reference answer, never.

    Exact match first, then reasoning-gym's verifier at full marks. Sorted lists are compared item
    by item, however separated: reasoning-gym's own verifier lets every number be off by one.
    """
    answer = " ".join(answer.split())
    if not problem.answer:
        return False
    if answer == problem.answer:
        return True
    if problem.family == "number_sorting":
        return re.split(r"[\s,]+", answer.strip("[] ")) == problem.answer.split()
    if problem.family in ("chain_sum", "base_conversion"):
        return _reasoning_gym(problem.family)(answer, {"answer": problem.answer}) == 1.0
    return False


def text_documents(
    problem: Problem, rng: random.Random, slip: float = 0.0, style: int = 0
) -> tuple[str, str]:
    r"""Plain text for pre-training: (worked, direct).

    worked: question, steps, 'Answer: \boxed{10}', where a slip leads to the wrong answer.
    direct: 'Q: ...' and 'A: \boxed{10}', always right. Different openings, so that a prompt can ask
    for either.
    """
    solution = solve(problem, rng=rng, slip=slip, style=style)
    worked = [problem.question, *solution.steps, rf"Answer: \boxed{{{solution.answer}}}", ""]
    direct = [f"Q: {problem.question}", rf"A: \boxed{{{problem.answer}}}", ""]
    return "\n".join(worked), "\n".join(direct)
