r"""Worked solutions, one line a step, with human slips on request; and the check of an answer.

A slip replaces the right result of one step by a wrong one, and everything after it follows from
the wrong result: text like this teaches a base model the method and leaves reinforcement learning
something to do. The wrong results are as people's are, off by one or the neighbour in the table:
one or two to a step, so that a model which has read them samples them. Every line states what the
next line needs, so no step looks back further than the question and the line above.

A response ends in a reference of two free letters, as a service desk's may: a choice that costs
nothing, as much of the wording of natural text does. It is entropy that RL has no reason to take
away; the doubt between right and wrong results is the one it has. Few choices among many disturb
RL the least: k ways hold ln k nats and add a noise of 1 - 1/k.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from string import ascii_letters

from q3mega.errors import UserError
from q3mega.problems.base import Problem
from q3mega.problems.generated.reasoning import FACTORS

# result(right, *wrong) is `right`, or now and then one of `wrong`: the slip.
Result = Callable[..., str]
# Fields of the lines, in the order of the work; the generator returns the answer they lead to.
Work = Iterator[dict[str, str]]


@dataclass(frozen=True)
class Solution:
    """Worked steps (one line each), the answer they lead to, and whether it is right."""

    steps: list[str]
    answer: str
    correct: bool


def _chain_sum(problem: Problem, result: Result) -> Work:
    numbers, signs = problem.meta["numbers"], problem.meta["signs"]
    total = numbers[0]
    for number, sign in zip(numbers[1:], signs[1:], strict=True):
        right = total + number if sign == "+" else total - number
        beside = [digit for digit in (right - 1, right + 1) if 0 <= digit <= 9]
        outcome = result(str(right), *map(str, beside))
        yield {"work": f"{total}{sign}{number}", "result": outcome, "answer": outcome}
        total = int(outcome)


def _modular_product(problem: Problem, result: Result) -> Work:
    product, *factors = problem.meta["numbers"]
    for factor in factors:
        right = product * factor % 10
        beside = product * FACTORS[FACTORS.index(factor) - 1] % 10
        outcome = result(str(right), str(beside))
        yield {"work": f"{product}*{factor}", "result": outcome, "answer": outcome}
        product = int(outcome)


def _number_sorting(problem: Problem, result: Result) -> Work:
    remaining = [str(number) for number in problem.meta["numbers"]]
    picked: list[str] = []
    while remaining:
        right, *others = sorted(set(remaining))
        picked.append(result(right, *others[:1]))
        remaining.remove(picked[-1])
        yield {"work": picked[-1], "result": " ".join(remaining), "answer": " ".join(picked)}


TAKE = "take {work} get {result}"
# What does the work, and its lines in three surface styles.
METHODS: dict[str, tuple[Callable[[Problem, Result], Work], tuple[str, str, str]]] = {
    "chain_sum": (_chain_sum, ("{work}={result}", "{work} is {result}", TAKE)),
    "modular_product": (_modular_product, ("{work}={result}", "{work} is {result}", TAKE)),
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
    family = problem.family
    if family not in METHODS:
        raise UserError(f"family={family!r} has no worked solution; solvable: {', '.join(METHODS)}")
    work, styles = METHODS[family]
    if not 0 <= style < len(styles):
        raise UserError(f"style={style}: give 0..{len(styles) - 1}")
    if not 0 <= slip <= 1 or (slip and rng is None):
        raise UserError(f"slip={slip}: give a probability, and with it a random generator (rng)")

    def result(right: str, *wrong: str) -> str:
        return rng.choice(wrong) if rng and wrong and rng.random() < slip else right

    lines, answer = [], ""
    for fields in work(problem, result):
        lines.append(styles[style].format(**fields).strip())
        answer = fields["answer"]
    return Solution(lines, answer, check(problem, answer))


def thinking_text(solution: Solution) -> str:
    """What goes between the think tags."""
    return "\n".join(solution.steps)


def response_text(solution: Solution, rng: random.Random | None = None) -> str:
    r"""What the user reads: 'The answer is \boxed{10}.', with `rng` and 'Ref aK.' after it."""
    text = rf"The answer is \boxed{{{solution.answer}}}."
    return f"{text} Ref {''.join(rng.choices(ascii_letters, k=2))}." if rng else text


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} without inner braces, or None."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return boxes[-1].strip() if boxes else None


@cache
def _same_number() -> Callable[[str, dict[str, str]], float]:
    # Imported at first use: it takes over a second, and most answers match exactly.
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn("chain_sum")


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
    if problem.family in ("chain_sum", "modular_product"):
        return _same_number()(answer, {"answer": problem.answer}) == 1.0
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
