import json
import random
import re
from collections import Counter
from itertools import pairwise, product
from math import prod

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from q3mega.errors import UserError
from q3mega.problems import FAMILIES, Problem, generate, problem
from q3mega.problems.generated.solutions import boxed, check, response_text, solve, text_documents

REASONING = [name for name, family in FAMILIES.items() if family.capability == "reasoning"]
VERIFIED = ("chain_sum", "modular_product", "number_sorting")


def truth(question: str) -> str:
    """The answer from the words of the question alone."""
    if question.startswith("Sort"):
        return " ".join(sorted(re.findall(r"\d", question)))
    if found := re.fullmatch(r"What is ([\d*]+) mod 10\?", question):
        return str(prod(map(int, found[1].split("*"))))[-1]
    return str(sum(map(int, re.findall(r"[+-]?\d+", question))))


@pytest.mark.parametrize("family", VERIFIED)
def test_reference_answers_follow_from_the_questions(family):
    problems = generate(family, 400, seed=1)
    assert [p.answer for p in problems] == [truth(p.question) for p in problems]
    assert {p.difficulty for p in problems} == set(FAMILIES[family].difficulties)
    assert all(p.capability == "reasoning" and p.family == family for p in problems)


def test_the_three_families_are_the_reasoning_capability():
    assert sorted(REASONING) == sorted(VERIFIED)


def test_ids_hang_on_the_text_alone_and_never_change():
    one, same = (problem("chain_sum", "reasoning", "What is 5-1?", "4", d) for d in (2, 3))
    assert one.id == same.id == "31e8524f90e66367"
    assert problem("number_sorting", "reasoning", "What is 5-1?", "4", 2).id != one.id
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": "What is 5-1?"}]
    assert problem("chain_sum", "reasoning", turns, "4", 2).id != one.id


@pytest.mark.parametrize("family", VERIFIED)
def test_split_is_disjoint_distinct_and_reproducible(family):
    train, held = generate(family, 800, seed=5), generate(family, 80, seed=5, heldout=True)
    assert len({p.id for p in train}) == 800 and len({p.question for p in held}) == 80
    assert not any(p.heldout for p in train) and all(p.heldout for p in held)
    assert not {p.question for p in train} & {p.question for p in held}
    assert generate(family, 300, seed=5) == train[:300]
    assert generate(family, 300, seed=6) != train[:300]


def test_one_problem_in_ten_is_held_out():
    drawn = random.Random(0)
    make = FAMILIES["chain_sum"].make
    share = sum(make(drawn, 6).heldout for _ in range(4000)) / 4000
    assert share == pytest.approx(0.1, abs=0.02)  # four standard errors


def test_an_exhausted_family_names_itself_and_its_size():
    legal = [f"Sort {a} {b} {c}." for a, b, c in product(range(1, 10), repeat=3)]
    training = [t for t in legal if not problem("number_sorting", "reasoning", t, "", 3).heldout]
    every = generate("number_sorting", len(training), seed=0, difficulty=(3, 3))
    assert {p.question for p in every} == set(training)
    with pytest.raises(UserError, match=rf"number_sorting.*only {len(training)} distinct"):
        generate("number_sorting", len(training) + 1, seed=0, difficulty=(3, 3))


@pytest.mark.parametrize("difficulty", [(1, 6), (6, 5), (6, 99)])
def test_impossible_difficulties_and_families_are_refused(difficulty):
    with pytest.raises(UserError, match="difficulty"):
        generate("chain_sum", 1, seed=0, difficulty=difficulty)
    with pytest.raises(UserError, match="'long_division' is unknown"):
        generate("long_division", 1, seed=0)


def test_chain_sums_stay_in_range_all_the_way():
    for p in generate("chain_sum", 500, seed=2):
        terms = [int(t) for t in re.findall(r"[+-]?\d+", p.question)]
        partial = [sum(terms[:i]) for i in range(1, len(terms) + 1)]
        assert len(terms) == p.difficulty and 0 <= min(partial) <= max(partial) <= 9


# Worked solutions


def lines_of(p: Problem, **kwargs) -> list[list[str]]:
    """The numbers of each line of the plain style."""
    return [re.findall(r"\d+", line) for line in solve(p, **kwargs).steps]


def test_chain_sum_lines_are_true_and_linked():
    for p in generate("chain_sum", 200, seed=3):
        steps = solve(p).steps
        assert len(steps) == p.difficulty - 1
        for left, right in (line.split("=") for line in steps):
            assert sum(map(int, re.findall(r"[+-]?\d+", left))) == int(right)
        links = [(a.split("=")[1], re.match(r"\d+", b)[0]) for a, b in pairwise(steps)]
        assert all(a == b for a, b in links) and steps[-1].endswith(f"={p.answer}")


def test_product_lines_hold_the_last_digit_of_the_product_so_far():
    for p in generate("modular_product", 200, seed=3):
        factors = [int(n) for n in re.findall(r"\d", p.question.removesuffix("mod 10?"))]
        lines, product = lines_of(p), factors[0]
        assert len(lines) == p.difficulty - 1 == len(factors) - 1
        for (left, factor, result), expected in zip(lines, factors[1:], strict=True):
            assert (int(left), int(factor)) == (product % 10, expected)
            product *= expected
            assert int(result) == product % 10 != 0


def test_sorting_lines_pick_the_smallest_of_what_is_left():
    for p in generate("number_sorting", 200, seed=3):
        left = re.findall(r"\d", p.question)
        for picked, *rest in lines_of(p):
            assert picked == min(left)
            assert Counter(left) == Counter([picked, *rest])
            left = rest
        assert not left


@pytest.mark.parametrize("family", VERIFIED)
@pytest.mark.parametrize("style", [0, 1, 2])
def test_every_style_ends_right_without_slips(family, style):
    for p in generate(family, 50, seed=4):
        solution = solve(p, style=style)
        assert solution.correct and solution.answer == p.answer
        assert boxed(response_text(solution)) == p.answer
    if style:
        assert solution.steps != solve(p).steps


@pytest.mark.parametrize("family", VERIFIED)
def test_slips_reach_the_answer(family):
    rng = random.Random(0)
    problems = generate(family, 500, seed=5)
    solutions = [solve(p, rng=rng, slip=0.1) for p in problems]
    for p, s in zip(problems, solutions, strict=True):
        assert s.correct == (s.answer == p.answer)
        # The first wrong line starts it; before it everything is as it should be.
        if not s.correct:
            assert s.steps != solve(p).steps
        numbers = [re.findall(r"-?\d+", line) for line in s.steps]
        if family == "number_sorting":
            assert s.answer == " ".join(line[0] for line in numbers)
        else:
            assert s.answer == numbers[-1][-1]
    share = sum(s.correct for s in solutions) / len(solutions)
    steps = sum(len(s.steps) for s in solutions) / len(solutions)
    assert 0.9**steps - 0.1 < share < 0.9  # about 0.9 to the number of steps, some slips undone


def test_a_slip_in_every_step_still_follows_from_the_line_before():
    rng = random.Random(0)
    for p in generate("chain_sum", 100, seed=6):
        steps = solve(p, rng=rng, slip=1.0).steps
        for a, b in pairwise(steps):
            assert b.startswith(a.split("=")[1])
        for left, right in (line.split("=") for line in steps):
            made = abs(sum(map(int, re.findall(r"(?:^-|[+-])?\d+", left))) - int(right))
            assert made == 1 or not 0 <= int(right) <= 9


def test_slips_are_drawn_from_the_generator_alone():
    p = generate("chain_sum", 1, seed=7, difficulty=(6, 6))[0]
    draws = [[solve(p, rng=random.Random(s), slip=0.3) for s in range(20)] for _ in range(2)]
    assert draws[0] == draws[1]


def test_bad_arguments_of_solve_are_refused():
    p = generate("chain_sum", 1, seed=0)[0]
    for bad in ({"style": 3}, {"slip": 0.5}, {"slip": 1.5, "rng": random.Random(0)}):
        with pytest.raises(UserError, match=next(iter(bad))):
            solve(p, **bad)
    with pytest.raises(UserError, match="no worked solution"):
        solve(problem("poetry", "reasoning", "Write.", "", 1))


def test_documents_for_pretraining():
    p = problem(
        "chain_sum", "reasoning", "What is 5-1-3?", "1", 3,
        meta={"numbers": [5, 1, 3], "signs": ["+", "-", "-"]},
    )  # fmt: skip
    worked, direct = text_documents(p, random.Random(0))
    assert worked == "What is 5-1-3?\n5-1=4\n4-3=1\nAnswer: \\boxed{1}\n"
    assert direct == "Q: What is 5-1-3?\nA: \\boxed{1}\n"
    worked, direct = text_documents(p, random.Random(0), slip=1.0, style=2)
    assert worked.count("take ") == 2 and direct.endswith("\\boxed{1}\n")


# Answers, against reasoning-gym


@pytest.mark.parametrize("family", VERIFIED)
def test_reasoning_gym_agrees_with_the_check(family):
    like = {"modular_product": "chain_sum"}  # a number against a number
    verify = reasoning_gym.get_score_answer_fn(like.get(family, family))
    rng = random.Random(1)
    for p in generate(family, 100, seed=8):
        given = solve(p, rng=rng, slip=0.15).answer
        answer, reference = given, p.answer
        if family == "number_sorting":
            answer, reference = (json.dumps(text.split()) for text in (given, p.answer))
        entry = {"answer": reference, "metadata": {"direction": "ascending"}}
        assert check(p, given) == (verify(answer, entry) == 1.0)


def own(item: dict) -> Problem | None:
    """A problem of reasoning-gym as one of ours; None where ours does not ask that."""
    meta, name = item["metadata"], item["metadata"]["source_dataset"]
    if name == "chain_sum":
        first, *others = meta["expression"].split()
        signs = ["+", *others[::2]]
        ours = {"numbers": [int(first), *map(int, others[1::2])], "signs": signs}
    else:
        if meta["direction"] != "ascending":
            return None
        ours = {"numbers": [int(float(n)) for n in meta["original_numbers"]]}
    return problem(name, "reasoning", item["question"], item["answer"], 1, meta=ours)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("chain_sum", {"min_digits": 1, "max_digits": 1, "max_terms": 8}),
        ("number_sorting", {"max_decimals": 0, "min_value": 1, "max_value": 9}),
    ],
)
def test_the_method_solves_the_problems_of_reasoning_gym(family, settings):
    dataset = reasoning_gym.create_dataset(family, size=600, seed=1, **settings)
    solved = 0
    for item in dataset:
        if (p := own(item)) is not None:
            answer = solve(p).answer
            if family == "number_sorting":
                answer = json.dumps([f"{n}.0" for n in answer.split()])
            assert dataset.score_answer(answer, item) == 1.0
            solved += 1
    assert solved >= 10


@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=8),
    st.sampled_from([" ", ", ", ",", " , ", "  ", "\n"]),
    st.sampled_from(["{}", "[{}]", " {} "]),
)
def test_sorted_lists_are_read_however_separated(numbers, separator, frame):
    right = sorted(map(str, numbers))
    p = problem("number_sorting", "reasoning", f"Sort {numbers}.", " ".join(right), len(right))
    assert check(p, frame.format(separator.join(right)))
    assert not check(p, frame.format(separator.join(right[:-1])))
    off_by_one = [str(int(right[0]) - 1), *right[1:]]
    assert not check(p, frame.format(separator.join(off_by_one)))


def test_sorting_is_exact_where_reasoning_gym_lets_every_number_be_off_by_one():
    entry = {"answer": "['3', '5', '7']", "metadata": {"direction": "ascending"}}
    wrong = "[2, 4, 6]"
    assert reasoning_gym.get_score_answer_fn("number_sorting")(wrong, entry) == 1.0
    assert not check(problem("number_sorting", "reasoning", "Sort 7 3 5.", "3 5 7", 3), wrong)


@pytest.mark.parametrize("text", ["10", " 10 ", "+10", "10.0", "010"])
def test_equal_numbers_are_right(text):
    assert check(problem("chain_sum", "reasoning", "What is 7+3?", "10", 2), text)


@pytest.mark.parametrize("text", ["", "11", "110", "10 or 11", "ten", "NaN", "1 0", "[10]"])
def test_other_texts_are_wrong(text):
    assert not check(problem("chain_sum", "reasoning", "What is 7+3?", "10", 2), text)


@given(st.text())
def test_any_text_is_judged(text):
    boxed(text)
    check(problem("chain_sum", "reasoning", "What is 7+3?", "10", 2), text)
    assert not check(problem("open", "reasoning", "Write about winter.", "", 1), text)


@given(st.text(alphabet="0123456789 +-", min_size=1), st.text(alphabet="ab{} \\\n"))
def test_the_last_box_counts(answer, before):
    assert boxed(f"{before}\\boxed{{1}} \\boxed{{{answer}}}.") == answer.strip()
