"""What servers of chat completions are known to answer: texts, or faults that say what to do."""

import json
import re
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.chat_models import replies
from q3mega.chat_models.replies import BROKEN, EMPTY, REFUSED, REJECTED, TOO_LONG, Fault, read
from q3mega.config.servers import ChatModelSpec
from q3mega.data.chat import parse
from q3mega.errors import NoReply


def body(message, end="stop", **more):
    choice = {"index": 0, "finish_reason": end, "message": message}
    return json.dumps({"choices": [choice], "usage": {"total_tokens": 7}} | more)


def one(text):
    (reply,) = read(200, {}, text).replies
    return reply


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "hi"}, "hi"),
        ({"content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, "hi"),
        ({"content": ["h", "i"]}, "hi"),
        ({"content": "hi", "reasoning": {"summary": "hm"}}, "<think>\nhm\n</think>\n\nhi"),
        ({"content": "hi", "thinking": "hm"}, "<think>\nhm\n</think>\n\nhi"),
        ({"content": "hi", "reasoning": "hm", "reasoning_content": "hm"},
         "<think>\nhm\n</think>\n\nhi"),
        ({"content": "hi", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
         "<think>\nhm\n</think>\n\nhi"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                      {"type": "text", "text": "hi"}]}, "<think>\nhm\n</think>\n\nhi"),
        ({"content": "<think>\nhm\n</think>\n\nhi", "reasoning": "hm"},
         "<think>\nhm\n</think>\n\nhi"),
        ({"content": "hm\n</think>\n\nhi"}, "hm\n</think>\n\nhi"),
        ({"content": "hi", "reasoning_content": ""}, "hi"),
        ({"content": "hi", "refusal": None, "tool_calls": []}, "hi"),
        ({"content": "a\ud83db"}, "a\ufffdb"),
        ({"content": "\ud83d\ude00"}, "\U0001f600"),
    ],
)  # fmt: skip
def test_a_reply_is_its_text_with_its_thinking_before_it(message, text):
    assert one(body(message)) == text
    assert one(body(message, end=None)) == text
    assert parse(text).content in ("hi", text)


def test_thinking_without_an_end_stays_open():
    for end in ("length", "max_tokens", None):
        assert not parse(one(body({"content": "", "reasoning": "hm"}, end))).closed


@pytest.mark.parametrize(
    ("message", "end", "rule"),
    [
        (None, "stop", EMPTY),
        ({"content": None}, "stop", EMPTY),
        ({"content": ""}, "length", EMPTY),
        ({"content": " \n"}, None, EMPTY),
        ({"content": []}, "stop", EMPTY),
        ({"content": None, "reasoning": "hm"}, "stop", EMPTY),
        ({"content": None, "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls", EMPTY),
        ({"content": None, "refusal": "I cannot help."}, "stop", REFUSED),
        ({"content": "Half of"}, "content_filter", REFUSED),
        ({"content": None}, "SAFETY", REFUSED),
    ],
)
def test_what_is_no_text_is_said_to_be_none(message, end, rule):
    reply = one(body(message, end))
    assert isinstance(reply, NoReply) and reply.rule == rule


def test_choices_come_in_the_order_of_their_numbers():
    choices = [{"index": i, "message": {"content": str(i)}} for i in (2, 0, 1)]
    assert read(200, {}, json.dumps({"choices": choices})).replies == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"total_tokens": 7}, 7),
        ({"prompt_tokens": 3, "completion_tokens": 4}, 7),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": -1}, 7),
        ({"prompt_tokens": 3}, None),
        ({"total_tokens": "7"}, None),
        ({"total_tokens": float("nan")}, None),
        ({}, None),
        (None, None),
        ([7], None),
    ],
)
def test_what_a_reply_took_where_the_server_says_it(usage, tokens):
    assert read(200, {}, body({"content": "hi"}, usage=usage)).tokens == tokens


def error(message, **more):
    return json.dumps({"error": {"message": message} | more})


FAULTS = [
    (200, error("filtered", code="content_filter"), REFUSED, "max_failures"),
    (200, json.dumps({"error": "overloaded", "choices": None}), BROKEN, "log"),
    (200, error("bad key", code=401), REJECTED, "key_env"),
    (200, "<html>log in</html>", BROKEN, "log-in page"),
    (200, "data: {\"choices\": []}\n\n", BROKEN, "stream: false"),
    (200, "", BROKEN, "log"),
    (200, '{"choices": [{"mess', BROKEN, "log"),
    (200, "[" * 100_000, BROKEN, "log"),
    (200, "[]", BROKEN, "chat completions"),
    (200, '{"choices": ["hi"]}', BROKEN, "chat completions"),
    (302, "", REJECTED, "url"),
    (400, error("The response was filtered due to the prompt triggering Azure OpenAI's content "
                "management policy", code="content_filter"), REFUSED, "max_failures"),
    (400, error("Input data may contain inappropriate content.", code="data_inspection_failed"),
     REFUSED, "max_failures"),
    (400, error("Content Exists Risk"), REFUSED, "max_failures"),
    (451, "", REFUSED, "max_failures"),
    (400, error("This model's maximum context length is 4096 tokens."), TOO_LONG, "max_tokens"),
    (400, error("'max_tokens' or 'max_completion_tokens' is too large: 9. This model's maximum "
                "context length is 8 tokens"), TOO_LONG, "max_tokens"),
    (413, "<h1>Request Entity Too Large</h1>", TOO_LONG, "max_tokens"),
    (429, error("Request too large for m: limit 10, requested 20"), TOO_LONG, "max_tokens"),
    (429, error("You exceeded your current quota", code="insufficient_quota"), REJECTED, "account"),
    (429, error("Rate limit: maximum tokens per minute exceeded"), BROKEN, "concurrency"),
    (402, error("Insufficient Balance"), REJECTED, "account"),
    (401, error("no"), REJECTED, "key_env"),
    (403, "<html>blocked</html>", REJECTED, "key_env"),
    (500, "oops", BROKEN, "log"),
    (503, "<html>Bad gateway</html>", BROKEN, "log"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "text", "rule", "remedy"), FAULTS)
def test_a_failure_is_told_apart_and_has_a_remedy(status, text, rule, remedy):
    with pytest.raises(Fault) as raised:
        read(status, {}, text)
    assert (raised.value.rule, remedy in raised.value.remedy) == (rule, True), vars(raised.value)
    assert "\n" not in raised.value.said and "<" not in raised.value.said


def test_every_remedy_names_settings_that_there_are():
    for remedy in replies.REMEDIES.values():
        named = re.findall(r"\b[a-z]+(?:_[a-z]+)+\b|\b[a-z]+(?=: [{a-z])", remedy)
        values = {"stream", "max_completion_tokens"}  # of extra_body and token_limit
        assert set(named) <= set(ChatModelSpec.model_fields) | values, remedy
    ChatModelSpec(url="http://x/v1", model="m", extra_body={"stream": False},
                  send_enable_thinking=False,
                  token_limit="max_completion_tokens", temperature=None)  # fmt: skip


SENT = {"max_tokens", "temperature", "seed", "n", "chat_template_kwargs"}


@pytest.mark.parametrize(
    ("status", "text", "field"),
    [
        (400, error("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                    "'max_completion_tokens' instead.", param="max_tokens"), "max_tokens"),
        (400, error("Unsupported value: 'temperature' does not support 0.0 with this model. Only "
                    "the default (1) value is supported.", param="temperature"), "temperature"),
        (400, error("Unrecognized request argument supplied: chat_template_kwargs"),
         "chat_template_kwargs"),
        (400, error("property 'seed' is unsupported"), "seed"),
        (422, json.dumps({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"],
                                      "input": {"temperature": 0}}]}), "seed"),
        (400, error("'n' must be at most 1"), "n"),
        (400, error("only one completion choice is allowed"), "n"),
        (400, error("no"), None),
        (400, error("Invalid prompt"), None),
    ],
)  # fmt: skip
def test_a_field_that_a_server_does_not_take_is_named(status, text, field):
    with pytest.raises(Fault) as raised:
        read(status, {}, text, SENT)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("3", 3, 3), ("0.5", 0.5, 0.5), (formatdate(4e9), 1e8, 4e9), ("1e400", None, None),
     ("-5", None, None), ("soon", None, None), ("", None, None), ("nan", None, None)],
)  # fmt: skip
def test_how_long_a_server_asks_to_wait(value, low, high):
    with pytest.raises(Fault) as raised:
        read(429, {"retry-after": value}, "")
    wait = raised.value.wait
    assert wait is None if low is None else low <= wait <= high


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "error", "code", "text", "index", "usage",
                         "reasoning", "finish_reason", "total_tokens", "detail", "loc", "type"]),
        inner, max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(st.one_of(_JSON.map(json.dumps), st.text(max_size=99)), st.sampled_from([200, 0, 400, 500]))
def test_any_answer_at_all_is_replies_or_a_fault(text, status):
    try:
        answer = read(status, {}, text, SENT)
    except Fault as fault:
        assert fault.remedy and fault.rule
        return
    assert (answer.replies and answer.tokens is None) or answer.tokens >= 0
    for reply in answer.replies:
        assert isinstance(reply, NoReply) or reply.encode().strip()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"data": [{"id": "a"}, {"id": "b"}]}', ["a", "b"]),
        ('[{"id": "a"}]', ["a"]),
        ('{"models": [{"name": "models/a"}]}', ["models/a"]),
        ('{"data": []}', []),
        ("{}", None),
        ('{"data": null}', None),
        ('{"data": [{"x": 1}]}', None),
        ('"a"', None),
    ],
)
def test_the_models_of_a_list(text, names):
    assert replies.models_in(text) == names
