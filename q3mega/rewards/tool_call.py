"""Tool calls: syntax and meaning of the first call of an episode."""

from collections.abc import Mapping
from typing import Any

from q3mega.data.chat import parse
from q3mega.rewards import Verdict, reward


@reward("tool_call")
def tool_call(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 for one call of the row's tool with the wanted argument; 0.5 for a well-formed other one."""
    calls = parse(completion).tool_calls
    if len(calls) != 1:
        return Verdict(0.0, "no call" if not calls else "several calls")
    (tool,), (call,) = row["tools"], calls
    (argument,) = tool["parameters"]
    if call["name"] != tool["name"] or set(call["arguments"]) != {argument}:
        return Verdict(0.0, "no such tool or argument")
    right = str(call["arguments"][argument]).replace(" ", "") == row["meta"]["argument"]
    return Verdict(1.0 if right else 0.5, "the right call" if right else "another argument")
