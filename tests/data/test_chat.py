"""The template against renderings of the released one; the parser against any text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.chat import last_flag, normalised, parse, render
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


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 50_000 + " " * 50_000,
        '<tool_call>{"' * 50_000,
        '<tool_call>{"a":"b",' * 30_000,
        "<tool_call>{" * 50_000 + "}</tool_call>" * 50_000,
        '<tool_call>{"' + '\\"<tool_call>{' * 30_000,
        '<tool_call>{"a":' + '{"a":' * 50_000,
    ],
)
def test_a_call_left_open_stays_in_the_content(text):  # in a careless parser after hours
    assert parse(text).content == text


@pytest.mark.parametrize(
    "tag", ["</tool_call>", "<tool_call>", "</think>", "<think>", "}</tool_call>"]
)
def test_a_call_may_speak_of_the_tags(tag):
    call = {
        "name": "write",
        "arguments": {"text": f'it "ends" with {tag} here', "more": {"a": tag}},
    }
    block = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    message = parse(f"<think>\nwhy\n</think>\n\nso\n{block}\n{CALL}")
    assert message.thinking == "why" and message.content == "so"
    assert [c["name"] for c in message.tool_calls] == ["write", "add"]
    assert message.tool_calls[0] == call and message.closed


def test_a_call_that_is_only_spoken_of_hides_none_of_the_answer():
    message = parse(f"<think>\nI write <tool_call> now\n</think>\n\n{CALL}")
    assert (message.thinking, len(message.tool_calls)) == ("I write <tool_call> now", 1)
    message = parse(f"<tool_call>now\n{CALL}\n{CALL}")  # malformed to the next closing tag
    assert (message.content, len(message.tool_calls)) == (f"<tool_call>now\n{CALL}", 1)


def test_recorded_chats_are_read_in_their_forms():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    bare = {"name": "f", "arguments": {"a": 1}}
    asked = [{"role": "developer", "content": [{"type": "text", "text": "Be"}, "ware"]}]
    asked.append({"role": "user", "content": [{"type": "text", "text": "q"}]})
    start = "<|im_start|>system\nBeware<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
    for turn, arguments in (
        ({"content": None, "tool_calls": [call]}, '{"a":1}'),  # a string is written as it is
        ({"tool_calls": [bare]}, '{"a": 1}'),
        ({"tool_calls": [{"name": "f", "arguments": ""}], "reasoning_content": None}, "{}"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": None}}]}, "{}"),
    ):
        text = render([*asked, {"role": "assistant", "reasoning": "so", **turn}])
        written = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        block = "<think>\nso\n</think>\n\n"
        assert text == f"{start}<|im_start|>assistant\n{block}{written}<|im_end|>\n"
    assert normalised(normalised(asked)) == normalised(asked)


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({"role": "assistant", "content": None}, r"\.content=None"),
        ({"role": "assistant", "content": None, "tool_calls": []}, r"\.content=None"),
        ({"role": "user", "content": {"text": "x"}}, r"\.content="),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"\.content\[0\]\.type='image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, r"\.content\[0\]="),
        ({"role": "user", "content": [3]}, r"\.content\[0\]="),
        ({"role": "user", "content": "caf\udce9"}, r"\.content='caf.udce9' holds half a surrogate"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, r"\.function_call"),
        ({"role": "assistant", "content": "", "reasoning_content": 3}, r"\.reasoning_content=3"),
        ({"role": "assistant", "content": "", "tool_calls": "f"}, r"\.tool_calls='f'"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, r"\.tool_calls\[0\]="),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
            r"\.tool_calls\[0\]\.arguments=.* must be a JSON object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]},
            r"\.tool_calls\[0\]\.arguments\.x=nan must be JSON",
        ),
    ],
)
def test_what_no_chat_can_hold_is_named_by_field(turn, field):
    with pytest.raises(UserError, match=rf"^messages\[1\]{field}"):
        render([{"role": "user", "content": "x"}, turn])


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
