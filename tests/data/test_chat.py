"""The template against renderings of the released one; the parser against any text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.chat import last_flag, parse, render
from q3mega.errors import UserError

CASES = json.loads(Path(__file__).with_name("template_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_render_equals_the_released_template(case):
    expected = case.pop("text") if "text" in case else None
    assert render(case.pop("messages"), **case) == expected


def test_parse_takes_a_turn_apart():
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    message = parse(f"<think>\nwhy\n</think>\n\nfine\n{call}")
    assert (message.thinking, message.content, message.closed) == ("why", "fine", True)
    assert message.tool_calls == [{"name": "add", "arguments": {"a": 1}}]
    assert parse("<think>\n\n</think>\n\nyes").thinking == ""
    assert parse("yes").thinking is None
    assert parse("<think>\nand then").closed is False


@pytest.mark.parametrize("bad", ["{", "[]", '{"name": 1, "arguments": {}}', '{"name": "a"}'])
def test_a_malformed_call_is_no_call(bad):
    text = f"<tool_call>\n{bad}\n</tool_call>"
    assert parse(text).tool_calls == []
    assert parse(text).content == text


pieces = st.sampled_from(
    ["<think>", "</think>", "\n", "x", "<tool_call>", "</tool_call>", '{"name": "f", ', '"arguments": {}}', "é", "\\"]
)


@given(st.lists(pieces | st.text(max_size=3), max_size=14).map("".join))
def test_parse_answers_any_text(text):
    message = parse(text)
    assert message.closed == ("</think>" in text or "<think>" not in text)
    assert (message.thinking is None) == ("<think>" not in text and "</think>" not in text)


@given(st.text(alphabet="ab \n", max_size=20), st.text(alphabet="ab", min_size=1, max_size=20))
def test_parse_inverts_render(thinking, content):
    text = render([{"role": "user", "content": "q"}, {"role": "assistant", "content": content, "reasoning_content": thinking}])
    turn = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    assert (parse(turn).thinking, parse(turn).content) == (thinking.strip("\n"), content)


def test_last_flag_wins():
    turns = [
        {"role": "system", "content": "/no_think"},
        {"role": "user", "content": "a /think b /no_think"},
        {"role": "assistant", "content": "/think"},
        {"role": "user", "content": "see https://x/think and /thinking"},
    ]
    assert last_flag(turns) == "no_think"
    assert last_flag(turns[:1]) == "no_think"
    assert last_flag(turns[3:]) is None


@pytest.mark.parametrize("bad", [[], [{"role": "boss", "content": "x"}], [{"role": "user", "content": None}]])
def test_bad_messages_are_named(bad):
    with pytest.raises(UserError, match="messages"):
        render(bad)
