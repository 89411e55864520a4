"""Every kind of constraint_cases.yaml on texts that meet it and texts that do not; then attacks."""

import json
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from q3mega.errors import UserError
from q3mega.rewards import score
from q3mega.rewards.instructions.constraints import (
    KINDS,
    check_constraints,
    describe,
    sample,
    satisfies,
    unmet,
)
from q3mega.rewards.instructions.text_units import visible

ROOT = Path(__file__).parents[3]
CASES = yaml.safe_load(Path(__file__).with_name("constraint_cases.yaml").read_text())
EXAMPLES = {name: {"kind": name} | parameters for name, (parameters, _, _) in CASES.items()}
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("name", KINDS)
def test_kind(name):
    _, good, bad = CASES[name]
    assert len(good) >= 2 and len(bad) >= 2
    check_constraints([EXAMPLES[name]])
    assert {text: unmet(text, [EXAMPLES[name]]) for text in good} == {text: [] for text in good}
    assert [text for text in bad if satisfies(text, EXAMPLES[name])] == []


@pytest.mark.parametrize("name", KINDS)
def test_the_documented_table_is_the_registry(name):
    kind, example = KINDS[name], EXAMPLES[name]
    parameters = [*kind.parameters, *["amount"] * kind.counts]
    row = f"| {name} | {', '.join(parameters)} | {describe(example)} |"
    assert row in (ROOT / "docs/rewards/instructions.md").read_text().splitlines()


def test_the_score_is_the_share_and_the_reason_names_the_first_failure():
    row = {"constraints": [EXAMPLES["no_commas"], {"kind": "words", "at_least": 20}]}
    text = f"<think>\nAn idea, or two\n</think>\n\n{' '.join('abcdefghijkl')}"
    verdict = score("constraints", text, row)
    assert (verdict.score, verdict.reason) == (0.5, "words: 12, at least 20 asked")
    assert score("constraints_strict", text, row).score == 0
    longer = f"{EMPTY}{' '.join('abcdefghijklmnopqrstuvwxyz')}"
    assert score("constraints", longer, row).reason == "all 2 met"
    assert score("constraints_strict", longer, row).score == 1


@pytest.mark.parametrize(
    "text",
    ["", EMPTY, "<think>\nhello world", f"{EMPTY}{EMPTY}hi", " \u200b\n", "!!", "\x00\u200f"],
)
def test_nothing_said_or_malformed_thinking_scores_0(text):
    row = {"constraints": [EXAMPLES["no_commas"], EXAMPLES["no_digits"]]}
    assert score("constraints", text, row).score == 0


def test_the_thinking_is_not_the_reply():
    row = {"constraints": [{"kind": "keyword", "word": "tea", "at_least": 1}]}
    assert score("constraints", "<think>\ntea\n</think>\n\nmilk", row).score == 0
    assert score("constraints", "<think>\nmilk\n</think>\n\ntea", row).score == 1


def test_the_instruction_again_is_no_reply():
    asked = [{"kind": "words", "at_least": 5}, {"kind": "keyword", "word": "tea", "at_least": 1}]
    demands = " ".join(map(describe, asked))
    prompt = f"Tell me what goats like to do. {demands}"
    row = {"constraints": asked, "messages": [{"role": "user", "content": prompt}]}
    for text in (prompt, demands, f"{demands}\n\n{demands.upper()}", f"{EMPTY}{prompt}"):
        verdict = score("constraints", text, row)
        assert (verdict.score, verdict.reason) == (0, "nothing but the instruction again")
    assert score("constraints", "Goats like to drink tea at night.", row).score == 1


STUFFED = ["tea ", "tea. ", "Tea is tea. ", "- tea\n", "茶", "tea\n\n", "1. tea\n", "# tea\n"]
STUFFED += ["*tea* [tea] 7 TEA tea? "]


@pytest.mark.parametrize("text", STUFFED)
def test_saying_the_same_again_reaches_no_minimum(text):
    text *= 1000
    for name, n in {
        "words": 40, "sentences": 3, "paragraphs": 2, "lines": 2, "characters": 700,
        "different_words": 5, "bullets": 2, "numbered_items": 2, "headings": 2, "questions": 2,
        "placeholders": 2, "highlighted": 2, "numbers": 2, "capital_words": 2,
    }.items():  # fmt: skip
        constraint = {"kind": name, "at_least": n}
        assert not satisfies(text, constraint), constraint


def test_real_text_loses_no_credit():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in ("words", "characters"):
        reason = unmet(text, [{"kind": name, "at_least": 10**6}])[0]
        assert "repeats" not in reason


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (
            {"kind": "wrods", "at_least": 2},
            r"\[0\]\.kind='wrods' is unknown: did you mean 'words'\?",
        ),
        ({"kind": ["words"]}, r"kind=\['words'\] is unknown"),
        ({"at_least": 2}, "must be a mapping with a kind"),
        ("words", r"constraints\[0\]='words' must be a mapping"),
        ({"kind": "words"}, r"\(words\): no amount is given: add at_least, at_most or exactly"),
        ({"kind": "words", "at_lest": 2}, "at_lest=2 is unknown: did you mean 'at_least'"),
        ({"kind": "words", "at_least": "2"}, "at_least='2' must be a whole number of at least 1"),
        ({"kind": "words", "at_least": True}, "at_least=True must be a whole number"),
        ({"kind": "words", "at_most": 0}, "at_most=0 must be a whole number of at least 1"),
        ({"kind": "words", "at_least": 2.0}, "at_least=2.0 must be a whole number"),
        ({"kind": "words", "exactly": 2, "at_most": 3}, "exactly=2 stands alone"),
        ({"kind": "words", "at_least": 9, "at_most": 3}, "at_least=9 is over at_most=3"),
        ({"kind": "keyword", "exactly": 2}, "word is missing: it must be a text that is not blank"),
        ({"kind": "keyword", "word": " \u200b", "exactly": 2}, "word=.* must be a text that is"),
        ({"kind": "letter", "letter": "ab", "exactly": 2}, "letter='ab' must be one letter"),
        ({"kind": "forbidden", "words": "tea"}, "words='tea' must be a list of texts"),
        ({"kind": "forbidden", "words": []}, r"words=\[\] must be a list of texts"),
        (
            {"kind": "language", "code": "german"},
            "code='german' must be one of ar, .*did you mean 'de'",
        ),
        ({"kind": "script", "name": "LATNI"}, "did you mean 'LATIN'"),
        ({"kind": "no_commas", "at_most": 3}, "at_most=3 is unknown"),
        ({"kind": "table", "columns": -1}, "columns=-1 must be a whole number"),
    ],
)
def test_a_wrong_constraint_is_named(constraint, message):
    with pytest.raises(UserError, match=message):
        check_constraints([constraint])
    with pytest.raises(UserError, match=message):
        score("constraints", "tea", {"constraints": [constraint]})


@pytest.mark.parametrize("constraints", [None, [], {}, "words", 3])
def test_a_row_needs_constraints(constraints):
    with pytest.raises(UserError, match="must be a list of at least one constraint"):
        score("constraints", "tea", {"constraints": constraints})


def test_describe_says_the_amount():
    words = {"kind": "words"}
    assert describe(words | {"at_least": 20}) == "Answer in at least 20 words."
    assert describe(words | {"exactly": 1}) == "Answer in exactly 1 word."
    assert describe(words | {"at_most": 9}) == "Answer in at most 9 words."
    assert describe(words | {"at_least": 5, "at_most": 9}) == "Answer in between 5 and 9 words."
    german = {"kind": "language", "code": "de"}
    assert describe(german) == "Answer in German, in whole sentences."
    braces = {"kind": "keyword", "word": "{x}", "at_least": 2}
    assert describe(braces) == 'Use the word "{x}" at least 2 times.'


# Characters that mean something to one kind or another.
TEXTS = st.text(alphabet=st.one_of(st.characters(), st.sampled_from('*#-|`<>[]"{}.?! \n,1aA茶я')))


@given(TEXTS, st.integers(0, 10**6), st.integers(1, 6))
def test_any_text_has_a_verdict(text, seed, n):
    asked = sample(random.Random(seed), n)
    row = json.loads(json.dumps({"constraints": asked}))  # a row comes from a file
    verdict = score("constraints", text, row)
    assert verdict.score * n == pytest.approx(round(verdict.score * n))
    assert score("constraints_strict", text, row).score == float(verdict.score == 1)


@given(TEXTS)
def test_any_text_has_a_verdict_of_every_kind(text):
    reasons = unmet(text, list(EXAMPLES.values()))
    assert {reason.split(":")[0] for reason in reasons} <= KINDS.keys()


GROWING = ["words", "lines", "paragraphs", "characters", "different_words", "letter"]


@given(TEXTS, TEXTS, st.sampled_from(GROWING), st.integers(1, 30))
def test_more_text_never_loses_a_minimum_nor_regains_a_maximum(text, more, name, n):
    constraint = {"kind": name} | ({"letter": "a"} if name == "letter" else {})
    longer = f"{text}\n\n{more}"
    if satisfies(text, constraint | {"at_least": n}):
        assert satisfies(longer, constraint | {"at_least": n})
    if satisfies(longer, constraint | {"at_most": n}):
        assert satisfies(f"{text} a", constraint | {"at_most": n + 1}) or not visible(more)


@given(TEXTS, st.sampled_from([n for n, k in KINDS.items() if k.counts]), st.integers(1, 9))
def test_bounds_agree(text, name, n):
    one = {k: v for k, v in EXAMPLES[name].items() if k not in ("at_least", "at_most", "exactly")}
    least, most = satisfies(text, one | {"at_least": n}), satisfies(text, one | {"at_most": n})
    assert satisfies(text, one | {"exactly": n}) == (least and most)
    assert satisfies(text, one | {"at_least": n, "at_most": n}) == (least and most)


UNITS = [
    ".", "a. ", "a", " ", "a'", "`", "```\n", "```python\n", "1. ", "我", "1.1", "*", "**a", "*a",
    "\n- x", "\u0301", "<<", "<<a", "[", "[a", "|", "|-", "\n|-|-|\n", "-", "\n# a", "Section 1\n",
    "tea", "tea ", "ö", "{", '{"a":', '"', "******", "\n\n", "\u200f", "\x00", "\ud800", "اب ",
    "a\u200d", "P.S. a\n", "Aa, ", "\u2028", "₿", "ￇ",
]  # fmt: skip


@pytest.mark.slow  # of quadratic time it would be hours
@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_of_anything_has_a_verdict(unit):
    text = f"tea {unit * (10**6 // len(unit))} tea"
    reasons = unmet(text, list(EXAMPLES.values()))
    assert len(reasons) > len(KINDS) / 3
    assert all(len(reason) < 10**6 + 200 for reason in reasons)


def test_direction_marks_and_controls_change_no_verdict():
    for name, (_, good, bad) in CASES.items():
        for text in (*good, *bad):
            marked = "\u200f\u2066" + text.replace(" ", "\u202b \x07\u2069")
            assert satisfies(marked, EXAMPLES[name]) == satisfies(text, EXAMPLES[name]), (
                name,
                text,
            )
