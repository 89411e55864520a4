"""The Qwen3 chat format: messages to text and back, and the thinking flags that text can carry.

There is one truth, `chat_template.jinja`: `render` executes the file that checkpoints ship with.
The template is not prefix-preserving (earlier turns lose their thinking): reinforcement learning
keeps token ids and never renders a turn again.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from q3mega.data.language import IDEOGRAPHS, SPACELESS
from q3mega.errors import UserError

TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
ROLES = ("system", "user", "assistant", "tool")
EMPTY_THINKING = "<think>\n\n</think>\n\n"
# A word of its own: between blanks, or beside letters and signs of languages that write none there.
_UNSPACED = rf"{IDEOGRAPHS}{SPACELESS}\u3001-\u303f\uac00-\ud7af\uff00-\uff65"
_FLAG = re.compile(
    rf"(?<![^\s{_UNSPACED}!?,;)])/(think|no_think)(?=[.,!?;:)]*(?:[\s{_UNSPACED}]|\Z))"
)


@dataclass(frozen=True)
class Message:
    """An assistant's text in parts.

    thinking: None without a think block, "" for an empty one. content: what follows the last
    </think>, without its well-formed tool calls; a malformed call stays in it. closed: False when
    a think block was opened and never closed.
    """

    thinking: str | None
    content: str
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    closed: bool = True


@cache
def _template() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    enable_thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Messages as the text that Qwen3 reads. enable_thinking=False pre-fills an empty think block.

    Raises UserError for no messages, an unknown role, or content that is not a string.
    """
    if not messages:
        raise UserError("messages is empty: a chat needs at least one turn")
    _check(messages)
    flag = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    return _template().render(
        messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt, **flag
    )


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{i}]={message!r} must be a mapping of role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"messages[{i}].role={role!r}: use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"messages[{i}].content={content!r} must be a string")


def parse(text: str) -> Message:
    """An assistant's raw text (without <|im_end|>) in parts; any text at all has an answer."""
    before, closing, after = text.rpartition("</think>")
    content, opening, rest = after.partition("<think>")  # a block that stays open is no answer
    thinking = None
    if closing or opening:
        thinking = (before.split("<think>", 1)[-1] + rest).strip("\n")
    calls = []
    kept = ""
    *parts, tail = content.split("</tool_call>")
    for part in parts:
        head, _, body = part.partition("<tool_call>")
        call = _call(body)
        if call is None:
            kept += part + "</tool_call>"
        else:
            kept += head
            calls.append(call)
    return Message(thinking, (kept + tail).strip("\n"), calls, closed=not opening)


def _call(text: str) -> dict[str, Any] | None:
    """A call that can be written back as JSON in UTF-8, or None."""
    try:
        call = json.loads(text)
        json.dumps(call, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no lone surrogate
    except (ValueError, RecursionError):  # ValueError is also what an integer too long raises
        return None
    good = isinstance(call, dict) and isinstance(call.get("name"), str)
    return call if good and isinstance(call.get("arguments"), dict) else None


def last_flag(messages: Sequence[Mapping[str, Any]]) -> Literal["think", "no_think"] | None:
    """The last /think or /no_think, as a word of its own, in a user or system turn.

    Raises UserError for an unknown role or content that is not a string.
    """
    _check(messages)
    for message in reversed(messages):
        if message["role"] in ("user", "system") and (found := _FLAG.findall(message["content"])):
            return found[-1]
    return None
