import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.chat import EMPTY_THINKING
from q3mega.errors import UserError
from q3mega.rewards import score

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer"},
        "place": {"type": "object", "properties": {"tags": {"type": "array"}}},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"name": "clock", "parameters": {"type": "object"}},
]
LIMA = {"name": "weather", "arguments": {"city": ["Lima", "Lima, Peru"]}, "optional": {"days": [1]}}
OSLO = {"name": "weather", "arguments": {"city": ["Oslo"], "unit": ["celsius"]}}


def text(*calls) -> str:
    bodies = [c if isinstance(c, str) else json.dumps(c) for c in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def made(name="weather", **arguments):
    return {"name": name, "arguments": arguments}


def grade(completion: str, *wanted, tools=TOOLS, **row) -> float:
    return score("tool_calls", completion, {"tools": tools, "calls": wanted, **row}).score


def test_one_call_is_graded_by_name_schema_and_arguments():
    for right in (made(city="Lima"), made(city=" LIMA, peru"), made(city="Lima", days=1.0)):
        assert grade(EMPTY_THINKING + text(right), LIMA) == 1
    # fits the schema, but is not what was asked for
    for valid in (made(city="Oslo"), made(city="Lima", days=2), made(city="Lima", unit="celsius")):
        assert grade(text(valid), LIMA) == 0.5
    for wrong in (
        {"city": 7},
        {"unit": "kelvin"},
        {"x": 1},
        {"days": True},
        {"place": {"tags": 7}},
    ):
        invalid = made(**{"city": "Lima"} | wrong)
        assert grade(text(invalid), LIMA) == grade(text(made()), LIMA) == 0.25
    for nothing in (made("clock"), made("none", city="Lima")):
        assert grade(text(nothing), LIMA) == 0


def test_malformed_calls_and_tags_earn_nothing():
    good = text(made(city="Lima"))
    for broken in (
        text("{"), text('{"name": "weather"}'), text('["weather"]'), good + text("oops"),
        good.removesuffix("</tool_call>"), f"<think>\n{good}", f"<think>\n{good}\n</think>\n\n",
        "weather(city='Lima')", "", good + "<tool_call>", text('{"name": "weather", "arguments": '
        + '{"city": ' + "[" * 5000 + "]" * 5000 + "}}"),
    ):  # fmt: skip
        assert grade(broken, LIMA) in (0, 0.25), broken[:99]
    assert grade("<think>\n" + good, LIMA) == grade("", LIMA) == 0


def test_parallel_calls_have_no_order_and_spare_ones_cost():
    first, second = made(city="Lima"), made(city="Oslo", unit="celsius")
    assert grade(text(first, second), LIMA, OSLO) == grade(text(second, first), LIMA, OSLO) == 1
    assert grade(text(first), LIMA, OSLO) == 0.5
    assert grade(text(first, first), LIMA, OSLO) == 0.75  # fits the schema of the second
    assert grade(text(first, second, made("clock")), LIMA, OSLO) == pytest.approx(2 / 3)
    assert grade(text(*[first] * 16), LIMA) == pytest.approx(1 / 16)
    assert grade(text(*[first] * 17), LIMA) == 0


def test_where_no_call_is_due_the_reply_has_to_say_something():
    assert grade("It is 42.", says=["42", "forty-two"]) == 1
    assert grade("", says=["42"]) == grade("No tool fits.", says=["42"]) == 0
    assert grade("42" + text(made(city="Lima")), says=["42"]) == 0


def test_nested_values_are_compared_whole():
    wanted = {"name": "weather", "arguments": {"city": ["x"], "place": [{"tags": [1, "A"]}]}}
    assert grade(text(made(city="x", place={"tags": [1, "a"]})), wanted) == 1
    for other in ({"tags": ["A", 1]}, {"tags": [1, "A", 2]}, {"tags": [True, "A"]}, {}):
        assert grade(text(made(city="x", place=other)), wanted) == 0.5


def test_wrong_rows_are_named_before_anything_is_sampled():
    with pytest.raises(UserError, match="'nothing' is no tool of the row: weather, clock"):
        grade("", {"name": "nothing", "arguments": {}})
    with pytest.raises(UserError, match="does not fit the schema of weather"):
        grade("", {"name": "weather", "arguments": {"city": [7]}})
    lists = LIMA | {"arguments": {"city": []}}, LIMA | {"optional": {"days": 1}}
    names = {"name": "weather"}, {"name": 7, "arguments": {}}
    for calls in ("weather", ["weather"], *([call] for call in (*lists, *names))):
        with pytest.raises(UserError, match=r"calls=.* must be a list of name and arguments"):
            score("tool_calls", "", {"tools": TOOLS, "calls": calls})
    with pytest.raises(UserError, match="tools='x' must be a list"):
        grade("", LIMA, tools="x")
    with pytest.raises(UserError, match="says='yes' must be a list of texts"):
        grade("", says="yes")
    for schema, says in (
        ({"type": "number of things"}, "no JSON schema"),
        ({"$ref": "http://localhost:9/x.json"}, "refers to another"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "refers to another"),
    ):
        tools = [{"name": "weather", "parameters": schema}]
        with pytest.raises(UserError, match=says):
            grade("", {"name": "weather", "arguments": {"a": [1]}}, tools=tools)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.sampled_from(["weather", "clock", ""]), st.dictionaries(st.sampled_from(
    ["city", "unit", "days", "place", "x"]), json_values))  # fmt: skip
def test_any_arguments_have_a_grade(name, arguments):
    value = grade(text({"name": name, "arguments": arguments}), LIMA)
    assert value in (0, 0.25, 0.5, 1)
    right = str(arguments.get("city", "")).casefold().strip() in ("lima", "lima, peru")
    assert (value == 1) <= right


@given(st.lists(st.sampled_from(
    ["<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "weather", "arguments": ',
     '{"city": "Lima"}', "}", "[" * 50, "\n", "\ud800", "1e999", "x"]), max_size=12))  # fmt: skip
def test_any_text_has_a_grade(parts):
    assert 0 <= grade("".join(parts), LIMA, OSLO) <= 1
