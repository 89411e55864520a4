import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.package_text import translations
from q3mega.errors import UserError
from q3mega.problems import generate
from q3mega.problems.generated.general import call
from q3mega.rewards import MODELS, TASK_REWARD, Verdict, reward, score
from q3mega.rewards.mode import mode_of, reply

EMPTY, THOUGHT = "<think>\n\n</think>\n\n", "<think>\n1+1=2\n</think>\n\n"


def user(*turns):
    return {"messages": [{"role": "user", "content": t} for t in turns]}


def test_a_reward_is_a_registered_function():
    @reward("shouting")
    def shouting(completion, row):
        return Verdict(float(completion.isupper()), "all upper case?")

    assert score("shouting", "AH", {}) == Verdict(1.0, "all upper case?")
    with pytest.raises(UserError, match="reward='shuoting' is unknown"):
        score("shuoting", "AH", {})


def test_several_rewards_multiply_and_give_the_reason_of_the_lowest():
    row = {"answer": "2", "tokens": 9, "max_tokens": 10} | user("1+1?")
    verdict = score(("answer", "length"), rf"{THOUGHT}\boxed{{2}}", row)
    assert verdict == Verdict(0.5, "9 of 10 tokens")
    assert score(("answer", "length"), THOUGHT, row) == Verdict(0.0, "no boxed answer")


@pytest.mark.parametrize(
    ("given", "number"),
    [(True, 1.0), (np.bool_(True), 1.0), (np.float32(0.5), 0.5), (np.int64(-2), -2.0),
     (np.array(0.25), 0.25), (torch.tensor(0.5, dtype=torch.bfloat16), 0.5), (Fraction(1, 4), 0.25),
     (torch.tensor(3.0, requires_grad=True), 3.0)],
)  # fmt: skip
def test_a_score_is_a_plain_number(given, number):
    reward("given")(lambda completion, row: given)
    assert type(Verdict(given, "").score) is type(score("given", "", {}).score) is float
    assert Verdict(given, "").score == score("given", "", {}).score == number


BROKEN = [math.nan, -math.inf, 10**400, "1", [1.0], np.ones(1), torch.ones(2), 1j, object]


@pytest.mark.parametrize("given", BROKEN, ids=repr)
def test_what_is_no_finite_number_is_an_error_that_names_reward_and_row(given):
    reward("given")(lambda completion, row: given)
    row = user("What is 1+1?") | {"where": "sums.jsonl:3"}
    with pytest.raises(
        UserError, match=r"^reward=given of 'What is 1\+1\?' \(sums.jsonl:3\) failed"
    ):
        score("given", "2", row)
    with pytest.raises((ValueError, OverflowError)):
        Verdict(given, "broken")


def test_an_exception_names_reward_and_row():
    @reward("fails")
    def fails(completion, row):
        return 1.0 / len(row["documents"]) / len(completion)

    asked = user("Who wrote Emma?")
    with pytest.raises(UserError, match=r"'Who wrote Emma\?' needs the field 'documents'$"):
        score("fails", "x", asked)
    with pytest.raises(UserError, match=r"^reward=fails of 'Who wrote Emma\?' failed with Zero"):
        score("fails", "", asked | {"documents": ["a"]})


def test_penalties_and_what_cannot_be_judged_among_several():
    values = {"bad": -0.5, "worse": -2.0, "half": 0.5, "right": 1.0, "unsure": None}
    for name, value in values.items():
        reward(name)(lambda completion, row, value=value: value)
    assert score(("bad", "worse"), "", {}).score == -2.0  # and not 1
    assert score(("half", "worse"), "", {}).score == -2.0
    assert score({"right": 3, "worse": 1}, "", {}).score == 0.25
    assert score({"right": 0.1, "half": 0.2}, "", {}).score == pytest.approx(2 / 3)
    found = score(("half", "unsure"), "", {})
    assert (found.score, found.reason, found.parts) == (
        None,
        "unsure cannot judge it",
        {"half": 0.5},
    )
    assert score({"unsure": 1, "right": 1}, "", {}).score is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_a_weighted_mean_of_equal_scores_is_that_score(weights):
    names = [f"full{i}" for i in range(len(weights))]
    for name in names:
        reward(name)(lambda completion, row: 1.0)
    assert score({n: w + 0.1 for n, w in zip(names, weights, strict=True)}, "", {}).score == 1.0


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (f"{EMPTY}2", "no_think"),
        (f"{THOUGHT}2", "think"),
        ("2", None),
        ("<think>\n1+1=2", None),
        ("1+1=2\n</think>\n\n2", None),
        (f"So {THOUGHT}2", None),
        (f"{EMPTY}{THOUGHT}2", None),
        (f"{THOUGHT}<think>", None),
    ],
)
def test_mode_of(text, mode):
    assert mode_of(text) == mode


def test_reply_is_none_for_malformed_tags():
    assert reply("2 ") == reply(f"{EMPTY}2") == reply(f"{THOUGHT}2\n") == "2"
    assert reply(f"{EMPTY}{EMPTY}2") is None and reply("2 </think>") is None


@pytest.mark.parametrize(
    ("turns", "good"),
    [
        (("1+1?",), "think"),
        (("1+1? /no_think",), "no_think"),
        (("1+1? /no_think", "2+2? /think"), "think"),
        (("1+1? /think", "2+2? /no_think", "3+3?"), "no_think"),
    ],
)
def test_the_last_flag_decides(turns, good):
    scores = {m: score("mode", f"{b}2", user(*turns)).score for m, b in MODES.items()}
    assert scores == {m: float(m == good) for m in MODES}


MODES = {"no_think": EMPTY, "think": THOUGHT}


def test_the_mode_of_the_row_comes_before_the_flags():
    row = user("1+1? /think") | {"meta": {"mode": "no_think"}}
    assert score("mode", f"{EMPTY}2", row).score == 1.0


def test_json_by_value_and_not_by_layout():
    row = {"answer": '{"word": "cat"}'}
    assert score("json", f'{EMPTY}{{ "word":\n"cat" }}', row).score == 1.0
    for text in ('{"word": "dog"}', '{"word": "dog", "word": "cat"}', "cat", "[]", "9" * 5000):
        assert score("json", EMPTY + text, row).score == 0.0


def test_json_of_any_depth_is_no_crash():
    assert score("json", "[" * 100_000, {"answer": "{}"}).score == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (call("calculator", "expression", "37*12"), 1.0),
        (call("calculator", "expression", "37 * 12"), 1.0),
        (call("calculator", "expression", "37*13"), 0.5),
        (call("calculator", "expression", " "), 0.0),
        (call("calculator", "x", "37*12"), 0.0),
        (call("lookup", "expression", "37*12"), 0.0),
        (call("calculator", "expression", "37*12") * 2, 0.0),
        (call("calculator", "expression", "37*12") + "<tool_call>\nhm\n</tool_call>", 0.0),
        (
            '<tool_call>\n{"name": "calculator", "arguments": {"expression": 444}}\n</tool_call>',
            0.0,
        ),
        ("I call calculator with 37*12.", 0.0),
        (f"<think>\n{call('calculator', 'expression', '37*12')}\n</think>\n\n444", 0.0),
    ],
)
def test_tool_call(text, value):
    (problem,) = generate("calculator", 1, seed=0)
    row = vars(problem) | {"meta": {"argument": "37*12"}}
    assert score("tool_call", text, row).score == value


def test_length_falls_in_the_last_fifth():
    scores = [
        score("length", "", {"tokens": n, "max_tokens": 100}).score for n in (0, 80, 90, 100, 120)
    ]
    assert scores == [1, 1, 0.5, 0, 0]


def test_repetition_is_the_share_of_new_triples():
    assert score("repetition", "", {}).score == score("repetition", "I like tea", {}).score == 1.0
    # i like tea | like tea i | tea i like | i like tea
    assert score("repetition", "I like tea i like tea", {}).score == 3 / 4
    assert score("repetition", "good " * 100, {}).score == 1 / 98


@pytest.mark.parametrize(
    "said",
    [
        "我觉得这个问题很难。",
        "これはとても難しいです。",
        "คำถามนี้ยากมาก",
        "यह कठिन है ",
        "hahaha",
        "🙂",
    ],
)
def test_a_loop_is_one_with_or_without_spaces(said):
    assert score("repetition", said * 200, {}).score < 0.2


def test_fluent_chinese_repeats_as_little_as_english():
    pairs = [pair for catalogue in translations("zh_Hans") for pair in catalogue]
    english, chinese = (" ".join(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    assert score("repetition", chinese, {}).score > score("repetition", english, {}).score - 0.1


def test_language_is_the_share_of_letters_in_the_scripts_asked():
    english, japanese = user("Say tea."), user("お茶は何?")
    assert score("language", "tea 12!", english).score == 1.0
    assert score("language", "te茶", english).score == 2 / 3
    chinese = user("圆的半径为 2，求它的面积。")
    assert (
        score("language", r"设 r=2，面积 𝑆=πr^2，即 $4\pi\text{ square}$ cm，ℝ。", chinese).score
        > 0.9
    )
    assert score("language", "The area is four pi. 面积", chinese).score < 0.2
    assert score("language", "чай", english).score == 0.0
    assert score("language", "茶はチャ", japanese).score == 1.0
    assert score("language", "茶", user("1+1=?")).score == 1.0


@given(st.text(max_size=80), st.sampled_from(["answer", "exact", "json", "mode", "tool_call"]))
def test_any_text_has_a_verdict(text, name):
    (problem,) = generate("calculator", 1, seed=0)
    row = vars(problem) | ({"answer": "{}"} if name == "json" else {})
    assert 0 <= score(name, text, row).score <= 1


def test_every_kind_of_reward_serves_two_tasks():
    kinds = [names if names in MODELS else "rule" for names in TASK_REWARD.values()]
    assert set(kinds) == {"rule", "judge", "preference"}
    assert all(kinds.count(kind) >= 2 for kind in kinds)
