"""Tool calls: syntax and meaning of an assistant turn that should call the row's tool."""

from collections.abc import Mapping, Sequence
from typing import Any

from q3mega.data.chat import parse
from q3mega.data.tool_schemas import arguments_of, name_of
from q3mega.errors import UserError
from q3mega.rewards import Verdict, reward


def _tool(row: Mapping[str, Any]) -> None:
    tools: Sequence[Any] = row.get("tools") or ()
    argument = row.get("meta", {}).get("argument")
    if len(tools) != 1 or len(arguments_of(tools[0])) != 1 or not isinstance(argument, str):
        raise UserError(
            f"tools={tools!r:.80} must be one tool with one argument, and meta.argument="
            f"{argument!r:.80} the text that is wanted for it"
        )


@reward("tool_call", needs=_tool)
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
