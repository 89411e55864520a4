"""The Qwen3 chat format: messages to text and back, and the thinking flags that text can carry.

There is one truth, `chat_template.jinja`: `render` executes the file that checkpoints ship with.
The template is not prefix-preserving (earlier turns lose their thinking): reinforcement learning
keeps token ids and never renders a turn again.

Control tokens are what the template writes, and the tags of an assistant's well-formed calls. What
spells one in a message, a tool's result or a schema is text (`data.tagged`).
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from q3mega.config.section import short
from q3mega.data.language import IDEOGRAPHS, SPACELESS
from q3mega.data.tagged import HALF_PAIR, SPELLED, Span, TaggedText
from q3mega.errors import UserError

TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
ROLES = ("system", "user", "assistant", "tool")
EMPTY_THINKING = "<think>\n\n</think>\n\n"
# A word of its own: between blanks, or beside letters and signs of languages that write none there.
_UNSPACED = rf"{IDEOGRAPHS}{SPACELESS}\u3001-\u303f\uac00-\ud7af\uff00-\uff65"
_FLAG = re.compile(
    rf"(?<![^\s{_UNSPACED}!?,;)])/(think|no_think)(?=[.,!?;:)]*(?:[\s{_UNSPACED}]|\Z))"
)
_Placed = tuple[int, int, dict[str, Any]]  # a call, its tags included, and where it stands
# Half a surrogate pair, which no text holds, marks a spelling while the template runs. It stands on
# the inner side, since the template looks at how a user's turn begins and ends.
_MARK = "\udc00"
_MARKED = re.compile(rf"{_MARK}(?:{SPELLED.pattern})|(?:{SPELLED.pattern}){_MARK}?")
_CALL_OPENS = re.compile(r"<tool_call>[ \t\r\n]*+")
_CALL_CLOSES = re.compile(r"[ \t\r\n]*+</tool_call>")
# Up to the next brace outside a string, where JSON has neither < nor a backslash.
_TO_BRACE = re.compile(r'(?:[^"{}<\\]++|"(?:[^"\\]++|\\.)*+")*+[{}]', re.DOTALL)


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
) -> TaggedText:
    """Messages as the text that Qwen3 reads. enable_thinking=False pre-fills an empty think block.

    Raises UserError for what `normalised` refuses, and for tools that are no JSON.
    """
    turns = [_turn(m, f"messages[{i}]") for i, m in enumerate(normalised(messages))]
    flag = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    text = _template().render(
        messages=turns,
        tools=_as_text(list(tools or ()), "tools"),
        add_generation_prompt=add_generation_prompt,
        **flag,
    )
    return _unmarked(text)


def normalised(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the one form that the template reads, from the forms that recorded chats have.

    The role developer is system; content in parts is their text, joined; the null or missing
    content of an assistant that calls tools is "", and `reasoning` is `reasoning_content`. A call's
    arguments stay an object or a string that holds one, as OpenAI's wire form has it; the template
    writes the string as it is. Raises UserError that names the message and the field for anything
    else, and for no messages.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"messages={short(messages)} must be a list of turns")
    if not messages:
        raise UserError("messages is empty: a chat needs at least one turn")
    return [_normalised(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalised(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{name}={short(message)} must be a mapping of role and content")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise UserError(f"{name}.role={short(role)}: use one of {', '.join(ROLES)}")
    if message.get("function_call"):
        raise UserError(f"{name}.function_call is the form of old: give tool_calls")
    turn = {**message, "role": role}
    if role == "assistant":
        thinking = message.get("reasoning_content")
        thinking = message.get("reasoning") if thinking is None else thinking
        if not isinstance(thinking, str | None):
            raise UserError(f"{name}.reasoning_content={short(thinking)} must be a string or null")
        turn["reasoning_content"] = thinking
        turn["tool_calls"] = _calls_of(message.get("tool_calls"), f"{name}.tool_calls")
        if turn["tool_calls"] and message.get("content") is None:
            return {**turn, "content": ""}
    return {**turn, "content": _content(message.get("content"), f"{name}.content")}


def _content(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{name}={short(content)} must be a string")
    for i, part in enumerate(content):
        part = part if isinstance(part, Mapping) else {"text": part}
        if (kind := part.get("type", "text")) != "text":
            raise UserError(f"{name}[{i}].type={short(kind)}: only text is read here")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{name}[{i}]={short(content[i])} must have a string as its text")
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def _calls_of(calls: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple | None):
        raise UserError(f"{name}={short(calls)} must be a list of calls")
    return [_named_call(call, f"{name}[{i}]") for i, call in enumerate(calls or ())]


def _named_call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{name}={short(call)} must be a function with its name and arguments")
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(_json(arguments) if isinstance(arguments, str) else arguments, Mapping):
        raise UserError(f"{name}.arguments={short(arguments)} must be a JSON object")
    return {"name": function["name"], "arguments": arguments}


def _turn(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the template reads of a message, with every spelling that is text marked.

    An assistant's thinking is parted from its content here as the template does it, from which a
    mark would hide the tags; those in the strings of its calls are none.
    """
    content, thinking = message["content"], message.get("reasoning_content")
    if message["role"] == "assistant":
        if thinking is None:
            thinking, content = _parted(content)
        content = with_calls(content)
    return {
        "role": message["role"],
        "content": _as_text(content, f"{name}.content"),
        "reasoning_content": _as_text(thinking, f"{name}.reasoning_content"),
        "tool_calls": _as_text(message.get("tool_calls"), f"{name}.tool_calls"),
    }


def _parted(content: str) -> tuple[str, str]:
    bare = _blanked(content)
    first, last = bare.find("</think>"), bare.rfind("</think>")
    if first < 0:
        return "", content
    thinking = content[:first].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thinking, content[last + len("</think>") :].lstrip("\n")


def _as_text(value: Any, name: str) -> Any:
    """JSON with every spelling of a control token marked, but for those that a TaggedText has.

    Raises UserError that names the value where it is no JSON in UTF-8.
    """
    if isinstance(value, str):
        if HALF_PAIR.search(value):
            raise UserError(f"{name}={short(value)} holds half a surrogate pair: it is no text")
        control = set(value.control) if isinstance(value, TaggedText) else ()
        return SPELLED.sub(lambda m: m[0] if m.span() in control else _marked(m[0]), value)
    if isinstance(value, Mapping):
        return {_as_text(k, name): _as_text(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, bool | int | float | None) or not finite:
        raise UserError(
            f"{name}={short(value)} must be JSON: a text, a finite number, true or null"
        )
    return value


def _marked(token: str) -> str:
    return _MARK + token if token.startswith("</") else token + _MARK


def _unmarked(text: str) -> TaggedText:
    """What the template wrote, whose control tokens are the spellings without a mark."""
    parts, control, at, size = [], list[Span](), 0, 0
    for match in _MARKED.finditer(text):
        token = match[0].strip(_MARK)
        parts += [text[at : match.start()], token]
        size += len(parts[-2]) + len(token)
        at = match.end()
        if token == match[0]:
            control.append((size - len(token), size))
    return TaggedText("".join([*parts, text[at:]]), control)


def _without(text: str, calls: Iterable[_Placed], fill: str = "") -> str:
    """The text without its calls, or with so many of `fill` in their place."""
    parts, at = [], 0
    for start, stop, _ in calls:
        parts += [text[at:start], fill * (stop - start)]
        at = stop
    return "".join([*parts, text[at:]])


def _content_of(text: str) -> tuple[int, int, int]:
    """Where an assistant's raw text has its last </think>, or -1, and its content (start, stop),
    which ends where another think block begins."""
    bare = _blanked(text)
    closes = bare.rfind("</think>")
    start = 0 if closes < 0 else closes + len("</think>")
    stop = bare.find("<think>", start)
    return closes, start, len(text) if stop < 0 else stop


def parse(text: str) -> Message:
    """An assistant's raw text (without <|im_end|>) in parts; any text at all has an answer."""
    closes, start, stop = _content_of(text)
    thinking, opened, content = None, stop < len(text), text[start:stop]
    if closes >= 0 or opened:
        before = text[: max(closes, 0)].split("<think>", 1)[-1]
        thinking = (before + text[stop:].removeprefix("<think>")).strip("\n")
    calls = list(_calls(content))
    content = _without(content, calls).strip("\n")
    return Message(thinking, content, [call for *_, call in calls], closed=not opened)


def assistant_text(text: str) -> TaggedText:
    """An assistant's raw text: the tags of its think block, which begins it, and of its well-formed
    calls are control tokens. What our own model sampled knows them already, and stays."""
    if isinstance(text, TaggedText):
        return text
    closes, start, stop = _content_of(text)
    opening = len(text) - len(text.lstrip())
    tags = [(opening, opening + len("<think>"))] if text.startswith("<think>", opening) else []
    if closes >= 0:
        tags.append((closes, start))
    calls = with_calls(text[start:stop]).control
    return TaggedText(text, [*tags, *((start + a, start + b) for a, b in calls)])


def with_calls(content: str) -> TaggedText:
    """An assistant's content: the tags of its well-formed calls are control tokens."""
    return TaggedText(content, _tags(_calls(content)))


def _tags(calls: Iterable[_Placed]) -> Iterator[Span]:
    for start, stop, _ in calls:
        yield start, start + len("<tool_call>")
        yield stop - len("</tool_call>"), stop


def _calls(text: str) -> Iterator[_Placed]:
    """The well-formed calls of a content; a malformed one reaches to the next closing tag."""
    at = 0
    while opening := _CALL_OPENS.search(text, at):
        if placed := _call_at(text, opening):
            yield placed
            at = placed[1]
        elif (closes := text.find("</tool_call>", opening.end())) >= 0:
            at = closes
        else:
            return


def _blanked(text: str) -> str:
    """The text with blanks for what looks like a call, in whatever it stands: tags in the strings
    of one are no tags."""
    calls, at = list[_Placed](), 0
    while opening := _CALL_OPENS.search(text, at):
        at = opening.end()
        if placed := _call_at(text, opening):
            calls.append(placed)
            at = placed[1]
    return _without(text, calls, " ")


def _call_at(text: str, opening: re.Match[str]) -> _Placed | None:
    start = opening.end()
    stop = _object_end(text, start)
    closing = _CALL_CLOSES.match(text, stop)
    call = _call(text[start:stop]) if closing else None
    return (opening.start(), closing.end(), call) if closing and call is not None else None


def _object_end(text: str, start: int) -> int:
    """Where the JSON object ends that begins at `start`; where none does, `start`.

    Of two that are read on one is in a string where the other is not, and stops at the next
    <tool_call>: reading from each takes linear time all the same.
    """
    at, depth = start, 0
    while step := _TO_BRACE.match(text, at):
        at = step.end()
        depth += 1 if text[at - 1] == "{" else -1
        if depth == 0:
            return at
    return start


def _call(text: str) -> dict[str, Any] | None:
    """A call that can be written back as JSON in UTF-8, or None."""
    call = _json(text)
    good = isinstance(call, dict) and isinstance(call.get("name"), str)
    return call if good and isinstance(call.get("arguments"), dict) else None


def _json(text: str) -> Any:
    """The value of a text that is strict JSON in UTF-8; None for any other."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no lone surrogate
    except (ValueError, RecursionError):  # ValueError is also what an integer too long raises
        return None
    return value


def last_flag(messages: Sequence[Mapping[str, Any]]) -> Literal["think", "no_think"] | None:
    """The last /think or /no_think, as a word of its own, in a user or system turn.

    Raises UserError for what `normalised` refuses.
    """
    for message in reversed(normalised(messages)):
        if message["role"] in ("user", "system") and (flags := _FLAG.findall(message["content"])):
            return flags[-1]
    return None
