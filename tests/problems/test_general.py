import random

import pytest

from q3mega.data.chat import EMPTY_THINKING, last_flag, render
from q3mega.environments.environment import Environment
from q3mega.problems import FAMILIES, generate
from q3mega.problems.generated import general
from q3mega.problems.generated.general import GENERAL, preference_pairs, respond, rubric
from q3mega.rewards import TASK_REWARD, score
from q3mega.rewards.models.judge import judge

CHARACTERS_A_TOKEN = 2  # of a vocabulary of 512; the tool block has 2.1, plain text 2.3


def worth(problem, response):
    """What a non-thinking response does of its task, by the rewards and an exact judge."""
    row, text = problem.row, EMPTY_THINKING + response
    if problem.tools:
        return score("tool_call", text, row).score
    if problem.capability == "preference":
        return float(rubric(response, problem) == 1.0)
    if problem.capability == "rag":
        same = f"Same? {problem.answer} = {problem.answer}"
        return judge([text], [row], lambda prompts: [float(p == same) for p in prompts])[0].score
    names = "answered" if problem.family == "think_follow" else TASK_REWARD[problem.family]
    return score(names, text, row).score


def test_five_capabilities_with_two_tasks_each_and_a_reward_for_all():
    capabilities = [FAMILIES[name].capability for name in GENERAL]
    assert set(capabilities) == set(general.CAPABILITIES)
    assert all(capabilities.count(c) >= 2 for c in general.CAPABILITIES)
    assert set(TASK_REWARD) == set(GENERAL)


@pytest.mark.slow
@pytest.mark.parametrize("family", GENERAL)
@pytest.mark.parametrize("skill", [0.0, 0.5, 1.0])
def test_responses_succeed_at_the_rate_of_the_skill(family, skill):
    rng = random.Random(0)
    n = 100 if family == "program" else 400  # each of them is run
    found = [worth(p, respond(p, rng, skill)) for p in generate(family, n, seed=1)]
    assert set(found) <= {0.0, 1.0}
    assert abs(sum(found) / n - skill) <= (1.5 / n**0.5 if skill == 0.5 else 0)


@pytest.mark.parametrize("family", GENERAL)
def test_failures_are_of_several_kinds(family):
    (problem,) = generate(family, 1, seed=2, difficulty=(FAMILIES[family].difficulties[-1],) * 2)
    rng = random.Random(0)
    kinds = {respond(problem, rng, 0.0) for _ in range(100)}
    assert len(kinds) >= (1 if family == "think_follow" else 2)


@pytest.mark.parametrize("family", GENERAL)
def test_the_text_alone_decides_the_answer(family):
    seen = {}
    for seed in range(3):
        for p in generate(family, 300, seed=seed):
            assert seen.setdefault(p.id, p) == p


@pytest.mark.parametrize("family", GENERAL)
def test_both_sides_of_the_split_are_large_enough(family):
    # Evaluation asks for up to 400 of think_follow and 200 of the others.
    wanted = 400 if family == "think_follow" else 200
    inside, outside = generate(family, 1000, seed=0), generate(family, wanted, seed=0, heldout=True)
    assert not {p.id for p in inside} & {p.id for p in outside}


@pytest.mark.parametrize("family", GENERAL)
def test_prompts_and_responses_are_short(family):
    rng = random.Random(0)
    for p in generate(family, 200, seed=0):
        prompt = render(p.messages, tools=p.tools, add_generation_prompt=True)
        limit = 275 if p.tools else 165 if len(p.messages) > 1 else 70
        assert len(prompt) / CHARACTERS_A_TOKEN <= limit
        assert len(respond(p, rng, 1.0)) / CHARACTERS_A_TOKEN <= 50


def test_think_follow_obeys_the_last_flag_in_whichever_turn():
    problems = generate("think_follow", 1000, seed=0)
    assert all(p.meta["mode"] == (last_flag(p.messages) or "think") for p in problems)
    modes = [p.meta["mode"] for p in problems]
    assert 400 < modes.count("think") < 620
    earlier = [p for p in problems if "think" not in p.question and last_flag(p.messages)]
    assert {p.meta["mode"] for p in earlier} == {"think", "no_think"}
    assert any(p.messages[0]["role"] == "system" for p in earlier)


@pytest.mark.parametrize("family", ["calculator", "lookup"])
def test_agents_solve_their_tasks_with_the_environment_alone(family):
    rng = random.Random(0)
    for p in generate(family, 100, seed=0):
        (message,) = Environment(p).step(EMPTY_THINKING + respond(p, rng, 1.0))
        final = EMPTY_THINKING + general.finish(p, message["content"])
        assert score("answer", final, vars(p)).score == 1.0
        assert p.answer not in render(p.messages, tools=p.tools).replace(p.question, "")
        assert Environment(p).step(EMPTY_THINKING + respond(p, rng, 0.0)) is None


@pytest.mark.parametrize("family", ["rag_answer", "rag_name"])
def test_rag_answers_are_in_the_text_or_nowhere(family):
    problems = generate(family, 600, seed=0)
    gone = [p for p in problems if p.answer == general.NOT_FOUND]
    assert 0.25 < len(gone) / 600 < 0.42
    for p in problems:
        facts, asked = p.question.removesuffix("?").rsplit(". ", 1)
        facts = dict(f.split(" has ") for f in facts.split(": ")[1].split(". "))
        if family == "rag_name":
            facts = {number: name for name, number in facts.items()}
        assert facts.get(asked.split()[-1], general.NOT_FOUND) == p.answer


def test_preference_pairs_follow_the_rubric_and_the_split():
    for heldout in (False, True):
        pairs = preference_pairs(200, 0, heldout)
        assert all(p.heldout == heldout for p, _, _ in pairs)
        odd = [worse for p, better, worse in pairs if rubric(better, p) <= rubric(worse, p)]
        assert len(odd) < 0.1 * len(pairs)  # what is no reply may still hold parts of one
        tricks = [w for p, _, w in pairs if w == p.question or "\\boxed" in w or "{}" in w]
        assert len(tricks) > 5 and not any("\\boxed" in b or "{}" in b for _, b, _ in pairs)
        # Longer is not always better: a model of length alone must not do.
        longer = sum(len(better) > len(worse) for _, better, worse in pairs)
        assert longer < 200
    assert preference_pairs(5, 0) == preference_pairs(5, 0) != preference_pairs(5, 1)


def test_the_rubric_counts_four_parts():
    seven = next(p for p in generate("describe", 100, seed=0) if p.meta["topic"] == "7")
    whole = "Sure. I like number 7. Look at 7. Ask me more."
    assert rubric(whole, seven) == 1.0
    for worse in (
        "I like number 7. Look at 7. Ask me more.",
        "Sure. I like number 7. Look at 8. Ask me more.",
        "Sure. I like number 7. Look at 7.",
        "Sure. I like number 7. I like number 7. Ask me more.",
    ):
        assert rubric(worse, seven) == 0.75
    assert rubric("7 " * 50, seven) == rubric("", seven) == 0.0
