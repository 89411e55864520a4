"""Instruction checks: the reply is what was asked for, to the letter, or as JSON to the value."""

import json
from collections.abc import Mapping
from typing import Any

from q3mega.data.chat import parse
from q3mega.rewards import Verdict, reward


@reward("exact")
def exact(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 when the reply after the thinking is exactly the reference."""
    message = parse(completion)
    right = message.closed and message.content.strip() == row["answer"]
    return Verdict(float(right), "as asked" if right else "not as asked")


@reward("json")
def json_object(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 when the reply is JSON of the reference's value; half when it is JSON at all."""
    message = parse(completion)
    try:
        given = json.loads(message.content)
    except (json.JSONDecodeError, RecursionError):
        return Verdict(0.0, "not JSON")
    if not message.closed or not isinstance(given, dict):
        return Verdict(0.0, "no JSON object")
    right = given == json.loads(row["answer"])
    return Verdict(1.0 if right else 0.2, "as asked" if right else "JSON of something else")
