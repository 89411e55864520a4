"""One row of a file: read, its chat in our form, every field that a stage reads of the right kind.

A field that is null is absent, as in tables where some rows lack a column. Rows in other people's
columns (`data.tasks.foreign`) become ours first.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, StrictStr, ValidationError

from q3mega.config.section import explain, short
from q3mega.errors import UserError
from q3mega.io import json_lines
from q3mega.problems.foreign_rows import converted

Row = dict[str, Any]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
          "tool": "tool", "function": "tool"}  # fmt: skip


def _scalar(value: Any) -> str:
    """A text, or a number as its text."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a text or a number")
    return str(value)


def _whole(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value


def _rewards(value: Any) -> Any:
    names = list(value) if isinstance(value, list | dict) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("must name a reward, several in a list, or several with weights")
    if len(set(names)) < len(names):
        raise ValueError("names a reward twice")
    weights = value.values() if isinstance(value, dict) else ()
    if not all(type(w) in (int, float) and 0 < w < math.inf for w in weights):
        raise ValueError("must give weights that are numbers above 0")
    return value


Scalar = Annotated[str, BeforeValidator(_scalar)]


class Schema(BaseModel):
    """What a row may hold. Other fields stay as they are, for the rewards that read them."""

    model_config = ConfigDict(extra="allow")

    messages: list[dict[str, Any]]
    id: Scalar | None = None
    domain: Scalar | None = None
    group: Scalar | None = None
    answer: Scalar | None = None  # the reference
    difficulty: Annotated[int, BeforeValidator(_whole)] | None = None
    mode: Literal["think", "no_think"] | None = None
    reward: Annotated[Any, BeforeValidator(_rewards)] = None
    tools: list[Any] | None = None  # `data.tasks.tools` checks them
    documents: list[StrictStr] | None = None
    script: StrictStr | None = None
    table: dict[str, StrictStr] | None = None
    limits: dict[str, Any] | None = None  # of a program's tests
    meta: dict[str, Any] | None = None
    response: StrictStr | None = None
    checklist: list[StrictStr] | None = None
    chosen: StrictStr | None = None
    rejected: StrictStr | None = None
    right: StrictBool | None = None


def read(path: Path) -> Iterator[Row]:
    """The rows of a file of JSON lines, each with its line in `where`.

    Raises UserError for a file that cannot be read or is empty, and for the first wrong row.
    """
    seen = False
    try:
        for number, line in json_lines(path):
            seen = True
            yield of_line(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): give a file of JSON lines") from error
    if not seen:
        raise UserError(f"{path} holds no rows: give one JSON object a line")


def of_line(line: bytes, where: str) -> Row:
    """A line as a row. Raises UserError with the line, the field, its value and what it must be."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        path, _, number = where.rpartition(":")
        raise UserError(f"{path} cannot be read (line {number}: {error}): give UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object")
    known = Schema.model_fields.keys()
    try:
        _check_texts(row)
        row = converted({name: value for name, value in row.items() if value is not None})
        row["messages"] = _chat(row)
        typed = Schema.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            message = f"{first['loc'][0]}={short(first['input'])} {first['ctx']['error']}"
        else:
            message = explain(dict(first), lambda path: list(known))
        raise UserError(f"{where}: {message}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from error
    checked = {name: getattr(typed, name) for name in typed.model_fields_set & known}
    return {"where": where} | row | checked


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON: take the field out, or write null")


def _check_texts(value: Any, name: str = "row") -> None:
    """No half of a surrogate pair and no NUL, which neither tokenizers nor databases can hold."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"{name}={short(value)} holds a NUL character: take it out")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{name}={short(value)} holds half of a surrogate pair: take it out")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_texts(key, f"a key of {name}")
            _check_texts(inner, key if name == "row" else f"{name}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_texts(inner, f"{name}[{i}]")


def _chat(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row, in the form that the template reads."""
    if isinstance(row.get("question"), str):
        if not row["question"].strip():
            raise ValueError("question is blank: give a text")
        return [{"role": "user", "content": row["question"]}]
    turns = row.get("messages")
    if not (isinstance(turns, list) and turns):
        raise ValueError(
            f"messages={short(turns)} must be a list of role and content, or give a text as "
            "question"
        )
    return [turn(message, f"messages[{i}]") for i, message in enumerate(turns)]


def turn(message: Any, name: str) -> dict[str, Any]:
    """One turn: a known role, content as one text, arguments of calls as objects."""
    if not isinstance(message, dict):
        raise ValueError(f"{name}={short(message)}: messages must be a list of role and content")
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise ValueError(
            f"{name}.role={short(message.get('role'))}: messages must be a list of role and "
            f"content, with one of the roles {', '.join(_ROLES)}"
        )
    calls = message.get("tool_calls") or []
    if isinstance(legacy := message.get("function_call"), dict):
        calls = [{"type": "function", "function": legacy}]
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise ValueError(f"{name}.tool_calls={short(calls)} must be a list, of an assistant's turn")
    kept = {k: v for k, v in message.items() if k not in ("function_call", "tool_calls") and v}
    if calls:
        kept["tool_calls"] = [_call(c, f"{name}.tool_calls[{i}]") for i, c in enumerate(calls)]
    content = message.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(
            f"{name}.content={short(content)}: messages must be a list of role and content, a text"
        )
    return kept | {"role": role, "content": content}


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else part
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"{name}.type={short(kind)}: only text can be read; leave the row out")


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name}={short(call)} must have a function with name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # the form of OpenAI's interface
        with suppress(ValueError):
            arguments = json.loads(arguments or "{}", parse_constant=_no_number)
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}.arguments={short(arguments)} must be an object, or one as JSON")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
