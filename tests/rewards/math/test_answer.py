import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.rewards import score
from q3mega.rewards.math.answer import boxes, number

THOUGHT = "<think>\n2+6=8\n</think>\n\n"


@pytest.mark.parametrize(
    ("reply", "value", "reason"),
    [
        (r"The answer is \boxed{8}.", 1.0, "exact"),
        (r"\boxed{8} is \boxed{ 8 }", 1.0, "exact"),
        (r"\boxed{8.0}", 1.0, "equal"),
        (r"\boxed{16/2}", 1.0, "equal"),
        (r"\boxed{7} or \boxed{8}", 0.0, "several different boxed answers"),
        (r"\boxed{2+6}", 0.0, "wrong answer"),
        (r"\boxed{2^3}", 0.0, "wrong answer"),
        (r"\boxed{8", 0.0, "no boxed answer"),
        ("8", 0.0, "no boxed answer"),
        (r"<think>\boxed{8}", 0.0, "think block malformed or never closed"),
        (r"\boxed{8}, that is \boxed{8.0}", 1.0, "equal"),
        (r"$x=\boxed{8}$, so \boxed{x=8}", 1.0, "equal"),
        (r"\boxed{8} \boxed{8.0} \boxed{9}", 0.0, "several different boxed answers"),
        (r"\boxed{9} is wrong, so \boxed{8}", 0.0, "several different boxed answers"),
        (r"\boxed{8} or \boxed{}", 0.0, "several different boxed answers"),
        (r"\boxed{\boxed{8}}", 1.0, "exact"),
        (r"\boxed{ $\boxed{8}$ }", 1.0, "exact"),
        (r"\boxed{9 \boxed{8}}", 0.0, "several different boxed answers"),
        (r"\fbox{8}", 1.0, "exact"),
        (r"\boxed {8}", 1.0, "exact"),
        ("\\boxed\n{8}", 1.0, "exact"),
        (r"\\boxed{8}", 1.0, "exact"),
        (r"\boxed 8.", 1.0, "exact"),
        (r"$\boxed 8$", 1.0, "exact"),
        (r"\boxed 9", 0.0, "wrong answer"),
        (r"Put it in \boxed as asked: \boxed{8}", 1.0, "exact"),
    ],
)
def test_answer(reply, value, reason):
    verdict = score("answer", THOUGHT + reply, {"answer": "8"})
    assert (verdict.score, verdict.reason) == (value, reason)


def test_without_thinking_the_whole_text_is_the_reply():
    assert score("answer", r"\boxed{8}", {"answer": "8"}).score == 1.0


def test_answered_asks_for_a_number_right_or_wrong():
    assert score("answered", rf"{THOUGHT}\boxed{{9}}", {"answer": "8"}).score == 1.0
    assert score("answered", rf"{THOUGHT}\boxed{{2+6}}", {"answer": "8"}).score == 0.0
    assert score("answered", f"{THOUGHT}8", {"answer": "8"}).score == 0.0


@pytest.mark.parametrize(
    ("reference", "reply", "value"),
    [
        ("1, 2", r"\boxed{1} and \boxed{2}", 1.0),
        ("1, 2", r"\boxed{x=2} or \boxed{x=1}", 1.0),
        ("x=1, y=2", r"\boxed{y=2}, \boxed{x=1}", 1.0),
        ("x=1, y=2", r"\boxed{x=2}, \boxed{y=1}", 0.0),
        ("ACD", r"\boxed{A}, \boxed{C}, \boxed{D}", 1.0),
        ("A", r"\boxed{A}, \boxed{C}", 0.0),
        ("1, 2", r"\boxed{1}, \boxed{2}, \boxed{3}", 0.0),
        ("1, 2", r"\boxed{1}", 0.0),
        ("(1,2)", r"\boxed{1}, \boxed{2}", 0.0),
        ("12", r"\boxed{1}, \boxed{2}", 0.0),
    ],
)
def test_a_list_may_have_a_box_for_each_item(reference, reply, value):
    assert score("answer", THOUGHT + reply, {"answer": reference}).score == value


def test_an_escaped_brace_is_no_brace():
    piecewise = r"f(x)=\left\{\begin{array}{l}1\\0\end{array}\right."
    assert boxes(rf"so \boxed{{{piecewise}}}") == [piecewise]
    assert score("answer", rf"\boxed{{{piecewise}}}", {"answer": piecewise}).score == 1.0
    assert boxes(r"\boxed{\{1,2\}} \boxed{a\\}") == [r"\{1,2\}", "a\\\\"]


def test_boxes_match_braces():
    assert boxes(r"a \boxed{\frac{1}{\sqrt{2}}} {b} \boxed{}") == [r"\frac{1}{\sqrt{2}}", ""]
    assert boxes(r"}} \boxed{a \boxed{b}}") == ["b", r"a \boxed{b}"]
    assert boxes(r"\boxed{" * 20_000) == []


@given(st.text(alphabet="{}\\boxed 1", max_size=60))
def test_boxes_are_pieces_of_the_text_with_balanced_braces(text):
    for box in boxes(text):
        assert box in text
        plain = re.sub(r"\\.", "", box)
        assert plain.count("{") == plain.count("}")


@given(st.fractions())
def test_number_reads_fractions(value):
    sign, top, bottom = "-" * (value < 0), abs(value.numerator), value.denominator
    assert number(str(value)) == value
    assert number(rf"{sign}\frac{{{top}}}{{{bottom}}}") == value


@given(st.integers())
def test_number_reads_thousands(value):
    assert number(f"{value:,}") == number(f"{value:,}.50") - Fraction(1 if value >= 0 else -1, 2)
    assert number(f"{value:,}") == value


@given(st.text(max_size=30))
def test_number_never_raises(text):
    assert number(text) is None or any(c.isdigit() for c in text)


@pytest.mark.parametrize(
    "text", ["", "1/0", "1/2/3", "1,00", "x", "1e9999", "10^3", "9" * 5000, "٣", "--1"]
)
def test_what_is_no_number(text):
    assert number(text) is None


def test_an_expression_copied_from_the_question_is_no_answer():
    row = {"answer": "x^2+2x+1", "messages": [{"role": "user", "content": "Expand $(x + 1)^2$."}]}
    verdict = score("answer", rf"{THOUGHT}\boxed{{(x+1)^2}}", row)
    assert (verdict.score, verdict.reason) == (0.0, "copied question")
    assert score("answer", rf"{THOUGHT}\boxed{{1+2x+x^2}}", row).score == 1.0
    row = {"answer": "9", "messages": [{"role": "user", "content": "Which is more, 9.0 or 8?"}]}
    assert score("answer", rf"{THOUGHT}\boxed{{9.0}}", row).score == 1.0
