"""Tool calls of one turn: of the row's one tool, or of several against their JSON schemas.

A call is data: nothing of it is run.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from q3mega.data.chat import parse
from q3mega.data.tool_schemas import arguments_of, name_of
from q3mega.errors import UserError
from q3mega.rewards.instructions.text_units import fold, visible
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reward
from q3mega.rewards.string_match import texts

VALID, NAMED = 0.5, 0.25  # arguments that fit the schema alone; not even those
MAX_CALLS = 16


def _check_one_tool(row: Mapping[str, Any]) -> None:
    tools: Sequence[Any] = row.get("tools") or ()
    argument = row.get("meta", {}).get("argument")
    if len(tools) != 1 or len(arguments_of(tools[0])) != 1 or not isinstance(argument, str):
        raise UserError(
            f"tools={tools!r:.80} must be one tool with one argument, and meta.argument="
            f"{argument!r:.80} the text that is wanted for it"
        )


@reward("tool_call", needs=_check_one_tool)
def tool_call(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for one call of the row's tool with the wanted argument; 0.5 for some other argument."""
    message = parse(completion)
    if len(message.tool_calls) != 1 or "tool_call>" in message.content:
        return Verdict(0.0, "malformed or several calls" if message.tool_calls else "no call")
    (tool,), (call,) = row["tools"], message.tool_calls
    (argument,) = arguments_of(tool)
    if call["name"] != name_of(tool) or set(call["arguments"]) != {argument}:
        return Verdict(0.0, "no such tool or argument")
    value = call["arguments"][argument]
    if not isinstance(value, str) or not value.strip():
        return Verdict(0.0, "an argument that is no text")
    right = value.replace(" ", "") == row["meta"]["argument"]
    return Verdict(1.0 if right else 0.5, "the right call" if right else "another argument")


def _check_calls(row: Mapping[str, Any]) -> None:
    if not _expected_calls(row.get("calls"), _schemas(row.get("tools"))) and not texts(row, "says"):
        raise UserError("says=[] leaves no reply that is right: give texts, or calls")


@reward("tool_calls", needs=_check_calls)
def tool_calls(completion: str, row: Mapping[str, Any]) -> Verdict:
    """The mean grade of the calls, each against a wanted one of its name, in any order.

    A grade is 1 for accepted arguments, 0.5 for others that fit the tool's schema, 0.25 for the
    name alone; the mean is over the wanted calls or those made, whichever are more. A malformed
    call earns 0. Where none is wanted, 1 for a reply without calls that holds one of row["says"].
    row["tools"]: {"type": "function", "function": {name, parameters}} or the function alone.
    row["calls"]: {"name": ..., "arguments": {name: [accepted, ...]}, "optional": likewise}.
    """
    schemas, expected = _schemas(row["tools"]), row["calls"]
    message = parse(completion)
    if reply(completion) is None or "tool_call>" in message.content:
        return Verdict(0.0, "malformed tags")
    made = message.tool_calls
    if not expected:
        return _without_calls(message.content, made, row["says"])
    if not 0 < len(made) <= MAX_CALLS:
        return Verdict(0.0, f"{len(made)} calls")
    grades = sorted(
        ((_grade(m, w, schemas), i, j) for i, m in enumerate(made) for j, w in enumerate(expected)),
        reverse=True,
    )
    total, used, met = 0.0, set[int](), set[int]()
    for grade, i, j in grades:  # the best pairs first
        if i not in used and j not in met:
            total, used, met = total + grade, used | {i}, met | {j}
    share = total / max(len(expected), len(made))
    return Verdict(share, f"{len(made)} calls for {len(expected)}, worth {total:.2f}")


def _without_calls(text: str, made: Sequence[Any], says: Sequence[str]) -> Verdict:
    if made:
        return Verdict(0.0, "a call where none was due")
    has_text = any(fold(word) in fold(visible(text)) for word in says)
    return Verdict(float(has_text), "no call" if has_text else "no call, and no answer")


def _grade(
    made: Mapping[str, Any], expected: Mapping[str, Any], schemas: Mapping[str, str]
) -> float:
    if made["name"] != expected["name"]:
        return 0.0
    try:
        if not _validator(schemas[made["name"]]).is_valid(made["arguments"]):
            return NAMED
        accepted = {**expected.get("optional", {}), **expected["arguments"]}
        right = set(expected["arguments"]) <= set(made["arguments"]) <= set(accepted) and all(
            any(_same(value, one) for one in accepted[name])
            for name, value in made["arguments"].items()
        )
    except RecursionError:  # JSON that is nested deeper than any schema here
        return NAMED
    return 1.0 if right else VALID


def _same(value: Any, expected: Any) -> bool:
    """Equal but for the case and blanks of text, and 5.0 for 5; true is not 1."""
    if isinstance(value, str) and isinstance(expected, str):
        return fold(value) == fold(expected)
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_same(value[k], expected[k]) for k in value)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    return isinstance(value, bool) == isinstance(expected, bool) and bool(value == expected)


def _schemas(tools: Any) -> dict[str, str]:
    """Name -> JSON of the arguments' schema."""
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise UserError(f"tools={tools!r:.80} must be a list of objects")
    functions = [tool.get("function", tool) for tool in tools]
    return {f["name"]: json.dumps(f.get("parameters", {"type": "object"})) for f in functions}


def _expected_calls(calls: Any, schemas: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
    if not isinstance(calls, list | tuple) or not all(map(_is_expected_call, calls)):
        raise UserError(
            f"calls={calls!r:.80} must be a list of name and arguments, with a list of accepted "
            "values for each"
        )
    for call in calls:
        if call["name"] not in schemas:
            raise UserError(f"calls: {call['name']!r} is no tool of the row: {', '.join(schemas)}")
        first = {name: values[0] for name, values in call["arguments"].items()}
        if not _validator(schemas[call["name"]]).is_valid(first):
            raise UserError(f"calls: {first!r:.80} does not fit the schema of {call['name']}")
    return calls


def _is_expected_call(call: Any) -> bool:
    if not isinstance(call, Mapping) or "arguments" not in call:
        return False
    accepted = [call["arguments"], call.get("optional", {})]
    return isinstance(call.get("name"), str) and all(
        isinstance(a, Mapping) and all(isinstance(v, list) and v for v in a.values())
        for a in accepted
    )


@lru_cache(256)
def _validator(schema: str) -> Draft202012Validator:
    """Raises UserError for a schema that is none, or that refers elsewhere: it would be fetched."""
    if any(f'"${name}": ' in schema for name in ("ref", "dynamicRef", "recursiveRef")):
        raise UserError(f"tools: the schema {schema:.80} refers to another: write it out")
    try:
        Draft202012Validator.check_schema(parsed_schema := json.loads(schema))
    except SchemaError as error:
        raise UserError(f"tools: {schema:.80} is no JSON schema: {error.message}") from error
    return Draft202012Validator(parsed_schema)
