"""Reasoning tasks, their worked solutions, and the cold start's two filters."""

import itertools
import random
from collections import Counter

import pytest

from q3mega.data.corpus import REASONING
from q3mega.data.filters import balance, query_filter, response_filter
from q3mega.data.tasks import generate
from q3mega.data.tasks.solutions import check, solve
from q3mega.data.tasks.tutor import candidates, unsuitable_queries
from q3mega.errors import UserError


def expected(problem) -> str:
    """The answer, from the question's text alone."""
    words = problem.question.rstrip("?.").split()
    if problem.family == "chain_sum":
        signed = words[-1].replace("-", " -").replace("+", " +").split()
        return str(sum(map(int, signed)))
    if problem.family == "number_sorting":
        return " ".join(sorted(words[1:]))
    if problem.family == "letter_counting":
        return str(words[4:].count(words[2]))
    value = int(words[3], 2)
    if words[-1] == "decimal":
        return str(value)
    digits = ""
    while value:
        digits, value = str(value % 4) + digits, value // 4
    return digits


@pytest.mark.parametrize("family", REASONING)
def test_answers_and_worked_solutions_are_right(family):
    for problem in generate(family, 150, seed=1):
        assert problem.answer == expected(problem)
        for style in range(3):
            solution = solve(problem, style=style)
            assert solution.correct
            assert solution.answer == problem.answer
            assert len(solution.steps) >= problem.difficulty - 1


@pytest.mark.parametrize("family", REASONING)
def test_a_slip_propagates_to_the_answer(family):
    rng = random.Random(0)
    problems = [p for p in generate(family, 60, seed=2) if p.difficulty > 3]
    slipped = [solve(p, rng=rng, slip=0.5) for p in problems]
    assert 0.3 < sum(not s.correct for s in slipped) / len(slipped)
    for problem, solution in zip(problems, slipped, strict=True):
        assert solution.correct == check(problem, solution.answer)


@pytest.mark.parametrize("family", REASONING)
def test_the_split_is_stable_and_disjoint(family):
    train = generate(family, 80, seed=3)
    held = generate(family, 80, seed=3, heldout=True)
    assert not {p.id for p in train} & {p.id for p in held}
    assert [p.id for p in train] == [p.id for p in generate(family, 120, seed=3)[:80]]
    assert all(p.heldout for p in held)


def test_too_many_problems_are_refused():
    with pytest.raises(UserError, match="n=5000: chain_sum"):
        generate("chain_sum", 5000, seed=0, difficulty=(2, 2))


def test_the_response_filter_finds_the_tutors_flaws():
    held = [p for f in REASONING for p in generate(f, 20, seed=4, heldout=True)]
    questions = {p.question for p in held}
    found: Counter[tuple[str | None, bool]] = Counter()
    for family in REASONING:
        for problem in generate(family, 60, seed=5):
            for c in candidates(problem, 4, seed=0, validation=held):
                rule = response_filter(problem, c.thinking, c.response, questions)
                found[c.flaw, rule is not None] += 1
    caught = sum(n for (flaw, dropped), n in found.items() if flaw and dropped)
    missed = sum(n for (flaw, dropped), n in found.items() if flaw and not dropped)
    wronged = found[None, True]
    assert caught / (caught + missed) > 0.95
    assert wronged == 0
    assert found[None, False] > 400


def test_the_query_filter_drops_what_it_should():
    assert all(query_filter(q, False) for q in unsuitable_queries(40, seed=0))
    good = list(itertools.chain.from_iterable(generate(f, 40, seed=6) for f in REASONING))
    assert not any(query_filter(q, False) for q in good)
    assert query_filter(good[0], True) == "answerable_without_thinking"


def test_balance_takes_as_many_of_each_family():
    queries = [
        p for f, n in zip(REASONING, (9, 4, 7, 6), strict=True) for p in generate(f, n, seed=7)
    ]
    kept = Counter(p.family for p in balance(queries, seed=0))
    assert kept == dict.fromkeys(REASONING, 4)
