import random

import pytest

from q3mega.problems import generate, problem
from q3mega.problems.generated.scripted_teacher import FLAWS, candidates, unsuitable_queries
from q3mega.problems.generated.solutions import check, response_text, solve, thinking_text
from q3mega.problems.query_filters import ResponseFilter, balance, query_filter
from q3mega.rewards import score_problem

FAMILIES = ("chain_sum", "modular_product", "number_sorting")
VALIDATION = {f: generate(f, 50, seed=9, heldout=True) for f in FAMILIES}
TEXTS = {p.question for problems in VALIDATION.values() for p in problems}
# 5-1-3+9 and what a teacher could say to it.
QUERY = problem(
    "chain_sum", "reasoning", "What is 5-1-3+9?", "10", 4,
    meta={"numbers": [5, 1, 3, 9], "signs": ["+", "-", "-", "+"]},
)  # fmt: skip
FILTER = ResponseFilter(sorted(TEXTS))
STEPS = "5-1=4\n4-3=1\n1+9=10"
RIGHT = "The answer is \\boxed{10}."


def rule_of(query, thinking, response, rules=FILTER):
    return rules(query, thinking, response, lambda text: score_problem(query, text).score == 1)


def judged():
    """(flaw, rule) of 750 candidates of the tutor, over the three families."""
    for family in FAMILIES:
        for query in generate(family, 50, seed=3):
            for c in candidates(query, 5, 1, VALIDATION[family]):
                yield c.flaw, rule_of(query, c.thinking, c.response)


def test_the_filter_finds_the_flaws_of_the_tutor():
    pairs = list(judged())
    dropped = [flaw for flaw, rule in pairs if rule]
    flawed = [rule for flaw, rule in pairs if flaw]
    assert sum(f is not None for f in dropped) / len(dropped) >= 0.95  # precision
    assert sum(r is not None for r in flawed) / len(flawed) >= 0.95  # recall
    for rule in FLAWS:
        named = [flaw == rule for flaw, r in pairs if r == rule]
        labelled = [r == rule for flaw, r in pairs if flaw == rule]
        assert sum(named) / len(named) >= 0.9 and sum(labelled) / len(labelled) >= 0.9, rule


@pytest.mark.parametrize(
    "thinking, response, rule",
    [
        (STEPS, RIGHT, None),
        (STEPS, "The answer is \\boxed{11}.", "wrong_answer"),
        (STEPS, "The answer is 10.", "wrong_answer"),
        (STEPS + "\n1+9=10" * 6, RIGHT, "repetition"),
        ("\n".join([STEPS] * 4), RIGHT, "repetition"),
        ("", RIGHT, "guess"),
        ("I feel that it is 10.", RIGHT, "guess"),
        ("1+9=10", RIGHT, "guess"),
        ("5-1=4\n4-3=1\n1+9=11", RIGHT, "disagreement"),
        ("5-1=4\nnun ist noch etwas\n4-3=1\n1+9=10", RIGHT, "language_mixing"),
        ("5-1=4\n然后\n4-3=1\n1+9=10", RIGHT, "language_mixing"),
        ("5-1=4\nтеперь\n4-3=1\n1+9=10", RIGHT, "language_mixing"),
        (f"What is 7+7-2?\n7+7=14\n14-2=12\n{STEPS}", RIGHT, "validation_copy"),
    ],
)
def test_the_six_rules_on_texts_of_other_hands(thinking, response, rule):
    rules = ResponseFilter(["What is 7+7-2?", "Sort 3 1 2."])
    assert rule_of(QUERY, thinking, response, rules) == rule


@pytest.mark.parametrize("family", FAMILIES)
def test_hardly_a_sound_solution_is_lost(family):
    problems = generate(family, 300, seed=4)
    rng = random.Random(0)
    texts = [(p, thinking_text(s), response_text(s, rng)) for p in problems for s in [solve(p)]]
    dropped = sum(rule_of(p, t, r) is not None for p, t, r in texts)
    assert dropped <= 0.02 * len(texts)


def test_query_filter_keeps_the_tasks_and_drops_the_rest():
    for family in FAMILIES:
        for query in generate(family, 50, seed=5):
            assert query_filter(query) is None
    rules = {query_filter(q) for q in unsuitable_queries(50, seed=5)}
    assert rules == {"several_questions", "not_verifiable"}


def test_unsuitable_queries_are_reproducible_and_have_no_right_answer_or_two():
    queries = unsuitable_queries(40, seed=1)
    assert len(queries) == 40 and queries == unsuitable_queries(40, seed=1)
    assert not any(check(q, "4") for q in queries if not q.answer)
    assert all(q.question.count("?") == 2 for q in queries if q.answer)


def test_the_tutor_is_reproducible_and_shows_every_flaw():
    query, held = generate("chain_sum", 1, seed=1)[0], VALIDATION["chain_sum"]
    many = candidates(query, 300, 0, held)
    assert many == candidates(query, 300, 0, held) != candidates(query, 300, 1, held)
    assert {c.flaw for c in many} == {None, *FLAWS}
    sound = sum(c.flaw is None for c in many) / len(many)
    assert sound == pytest.approx(0.6, abs=0.11)  # four standard errors
    assert "validation_copy" not in {c.flaw for c in candidates(query, 300, 0)}


def test_balance_is_even_complete_and_reproducible():
    sizes = dict(zip(FAMILIES, (30, 12, 25), strict=True))
    pool = [p for f, n in sizes.items() for p in generate(f, n, seed=2)]
    kept = balance(pool, 0)
    assert [sum(p.family == f for p in kept) for f in FAMILIES] == [12] * 3
    assert len({p.id for p in kept}) == 36 and {p.id for p in kept} <= {p.id for p in pool}
    assert kept == balance(pool, 0) and balance([], 0) == []


# -- problems of one's own, answered in prose ------------------------------------------------------

PROSE = problem(
    "algebra", "reasoning", "Let $f(x)=2x+3$ for x in [0, 4). For which x is f(x)=8?", "5/2", 0,
    meta={"reward": "answer"},
)  # fmt: skip
HELD = (
    "A farmer has 17 sheep, and all but 9 of them run away on a rainy day; how many are left, "
    "and how many of those that ran are lost?"
)
THOUGHT = (
    "We need f(x) = 8, so 2x + 3 = 8. Subtracting 3 from both sides gives 2x = 5, and dividing by "
    "two gives x = 5/2. That lies between 0 and 4, so it is in the domain, with α = β fixed."
)


@pytest.mark.parametrize(
    "thinking, response, rule",
    [
        (THOUGHT, r"So $x=\boxed{\frac52}$.", None),
        (THOUGHT + r" So \boxed{2.5}.", r"\boxed{5/2}", None),
        (THOUGHT, "", "unfinished"),
        (THOUGHT, r"\boxed{3}", "wrong_answer"),
        (THOUGHT + "\n" + "wait, let me check that again\n" * 3, r"\boxed{5/2}", "repetition"),
        (" ".join(f"{THOUGHT} And so again." for _ in range(4)), r"\boxed{5/2}", "repetition"),
        (f"{THOUGHT} As in: {HELD}", r"\boxed{5/2}", "validation_copy"),
        (f"{THOUGHT} As in: {HELD[13:110].lower()}...", r"\boxed{5/2}", "validation_copy"),
        (f"{THOUGHT}\n所以我们继续。{THOUGHT[:60]}", r"\boxed{5/2}", "language_mixing"),
        (f"{THOUGHT}\nтеперь проверим", r"\boxed{5/2}", "language_mixing"),
        ("It must be 5/2, I am sure.", r"\boxed{5/2}", "guess"),
        ("", r"\boxed{5/2}", "guess"),
        (THOUGHT + r" So \boxed{4}.", r"\boxed{5/2}", "disagreement"),
    ],
)
def test_the_six_rules_on_prose(thinking, response, rule):
    assert rule_of(PROSE, thinking, response, ResponseFilter([HELD, PROSE.question])) == rule


def test_a_chinese_question_may_be_thought_about_in_chinese():
    query = problem("algebra", "reasoning", "解方程 2x+3=8。", "5/2", 0)
    thinking = "首先将方程两边同时减去三，得到 2x=5，然后两边除以二，得到 x=5/2，代入检验成立。"
    assert rule_of(query, thinking, r"\boxed{5/2}") is None
    assert rule_of(query, thinking + " Проверим это", r"\boxed{5/2}") == "language_mixing"


@pytest.mark.parametrize(
    "question, rule",
    [
        ("If x is 3. and y is 4.5. what is x+y?", None),
        ("What is (a+b)(a-b) for a=2, b=1?", None),
        ("Find x? And what is y?", "several_questions"),
        ("(a) Find x. (b) Find y.", "several_questions"),
        ("Find (i) the mean (ii) the median.", "several_questions"),
    ],
)
def test_several_questions_in_prose(question, rule):
    assert query_filter(problem("algebra", "reasoning", question, "7", 0)) == rule


def test_code_is_verifiable_without_an_answer():
    tests = {"reward": "code", "tests": {"cases": [["1", "1"]]}}
    assert query_filter(problem("code", "reasoning", "Print it.", "", 0, meta=tests)) is None
    assert query_filter(problem("code", "reasoning", "Print it.", "", 0)) == "not_verifiable"


def test_balance_up_to_a_number_takes_the_domains_in_turn():
    sizes = dict(zip(FAMILIES, (30, 2, 25), strict=True))
    pool = [p for f, n in sizes.items() for p in generate(f, n, seed=2)]
    kept = balance(pool, 0, most=22)
    assert [sum(p.family == f for p in kept) for f in FAMILIES] == [10, 2, 10]
    assert len(balance(pool, 0, most=99)) == 57


def test_a_long_thought_is_read_in_a_moment():
    lines = [f"step {i} of {i * i}" for i in range(3000)]
    assert rule_of(PROSE, "\n".join(lines), r"\boxed{5/2}") is None


IN_CHINESE = problem("own", "reasoning", "证明下列等式。", "4", 1, meta={"reward": "answer"})


@pytest.mark.parametrize(
    ("question", "rule"),
    [
        ("小明有几个苹果？", None),
        ("小明有几个苹果？小红有几个？", "several_questions"),
        ("（1）求 x 的值。（2）求 y 的值。", "several_questions"),
        ("由式 (1) 与式 (2) 求 x。", None),
        ("كم عدد الكتب؟ وكم عدد الأقلام؟", "several_questions"),
    ],
)
def test_questions_are_counted_in_every_script(question, rule):
    assert query_filter(problem("own", "reasoning", question, "4", 1)) == rule


@pytest.mark.parametrize(
    ("thinking", "rule"),
    [
        ("我们先设未知数，再列方程，最后检验答案是否正确，这样就完成了证明的全部过程。", None),
        ("设 𝑥∈ℝ，则 $\\mathrm{rank}$ 与 \\alpha 有关，于是我们得到所要证明的等式成立了。", None),
        ("我们先设未知数再列方程最后检验答案是否正确 и потом мы это решим", "language_mixing"),
        ("我觉得这个问题很难所以要再想一想才行。" * 20, "repetition"),
        ("คำถามนี้ยากมากจริงๆนะครับผม" * 60, "repetition"),
        ("มากมาย" * 200, "repetition"),
    ],
)
def test_thinking_is_held_to_the_same_rules_in_every_script(thinking, rule):
    assert rule_of(IN_CHINESE, thinking, "答案是 \\boxed{4}") == rule
