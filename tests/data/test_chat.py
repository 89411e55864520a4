"""The template against renderings of the released one; the parser against any text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.chat import last_flag, parse, render
from q3mega.errors import UserError

CASES = json.loads(Path(__file__).with_name("template_cases.json").read_text(encoding="utf-8"))
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_render_equals_the_released_template(case):
    options = {k: v for k, v in case.items() if k not in ("messages", "text")}
    assert render(case["messages"], **options) == case["text"]


def test_parse_takes_a_turn_apart():
    message = parse(f"<think>\nwhy {CALL}\n</think>\n\nfine\n{CALL}")
    assert (message.thinking, message.content, message.closed) == (f"why {CALL}", "fine", True)
    assert message.tool_calls == [{"name": "add", "arguments": {"a": 1}}]
    assert parse("<think>\n\n</think>\n\nyes").thinking == ""
    assert parse("yes").thinking is None


def test_a_block_left_open_is_no_answer():
    message = parse(f"so <think>\nand then {CALL}")
    assert (message.content, message.tool_calls, message.closed) == ("so ", [], False)
    message = parse("<think>\na\n</think>\n\nb<think>c")
    assert (message.content, message.closed) == ("b", False)


def test_the_last_closing_tag_counts():
    assert parse("<think>a</think>b</think>c").content == "c"


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        '{"name": 1, "arguments": {}}',
        '{"name": "a"}',
        '{"name": "a", "arguments": "{}"}',
        '{"name": "a", "arguments": {"x": NaN}}',
        '{"name": "a", "arguments": {"x": 1e999}}',
        '{"name": "\\ud800", "arguments": {}}',
        pytest.param('{"name": "a", "arguments": {"x": %s}}' % ("1" * 5000), id="long integer"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param(" " * 100_000, id="blank"),
    ],
)
def test_a_malformed_call_is_no_call(bad):
    text = f"<tool_call>\n{bad}\n</tool_call>"
    assert parse(text).tool_calls == []
    assert parse(text + CALL).content == text
    assert len(parse(text + CALL).tool_calls) == 1


def test_a_call_left_open_stays_in_the_content():
    text = "<tool_call>" * 50_000 + " " * 50_000  # quadratic in a careless parser
    assert parse(text).content == text


TAGS = ["<think>", "</think>", "\n", "<tool_call>", "</tool_call>", '{"name": "f", ']
PIECES = st.sampled_from([*TAGS, '"arguments": {}}', CALL, "é", "\\", "\ud800"])


@given(st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join))
def test_parse_answers_any_text(text):
    message = parse(text)
    assert message.closed == (text.rfind("<think>") <= text.rfind("</think>"))
    assert (message.thinking is None) == ("<think>" not in text and "</think>" not in text)
    assert len(message.tool_calls) <= text.count("</tool_call>")


LINE = st.text(alphabet="ab \n", max_size=20)
ARGUMENTS = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3)


@given(LINE, st.text(alphabet="ab", max_size=9), st.lists(ARGUMENTS, max_size=3))
def test_parse_inverts_render(thinking, content, arguments):
    calls = [{"name": "f", "arguments": a} for a in arguments]
    reply = {"role": "assistant", "content": content, "reasoning_content": thinking}
    text = render([{"role": "user", "content": "q"}, reply | {"tool_calls": calls}])
    message = parse(text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n"))
    assert (message.thinking, message.content) == (thinking.strip("\n"), content)
    assert message.tool_calls == calls


def test_last_flag_wins():
    turns = [
        {"role": "system", "content": "/no_think"},
        {"role": "user", "content": "a /think b /no_think"},
        {"role": "assistant", "content": "/think"},
        {"role": "user", "content": "see https://x/think and /thinking"},
    ]
    assert last_flag(turns) == "no_think"
    assert last_flag(turns[:1]) == "no_think"
    assert last_flag([*turns, {"role": "system", "content": "/think\nplease"}]) == "think"
    assert last_flag(turns[2:]) is None


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("请解释一下/no_think", "no_think"),
        ("你好。/think", "think"),
        ("说明 /no_think。谢谢", "no_think"),
        ("日本語で/think", "think"),
        ("설명해줘/no_think", "no_think"),
        ("Answer briefly /no_think.", "no_think"),
        ("目录/think/文件", None),
        ("docs/think.md and ./think", None),
        ("/think.md, /think-tank, (/think)", None),
        ("да/think", None),
    ],
)
def test_a_flag_stands_alone_in_every_script(text, flag):
    assert last_flag([{"role": "user", "content": text}]) == flag


@pytest.mark.parametrize(
    "bad", [{"role": "boss", "content": "x"}, {"role": "user", "content": None}, {"role": []}, "hi"]
)
@pytest.mark.parametrize("read", [render, last_flag])
def test_bad_messages_are_named(read, bad):
    with pytest.raises(UserError, match=r"messages\[1\]"):
        read([{"role": "user", "content": "x"}, bad])


def test_no_message_is_an_error():
    with pytest.raises(UserError, match="messages is empty"):
        render([])
