"""What a prompt says of a tool: full function schemas, and how to read these and bare ones.

A bare schema is `general.tool`'s, `{"name": ..., "parameters": {argument: type}}`, for the smallest
models; a full one is what Qwen3's template and OpenAI's interface know as a function.
"""

from collections.abc import Mapping
from typing import Any

from q3mega.errors import UserError

Schema = Mapping[str, Any]
MAX_STEPS = 64  # turns with calls that a row may allow
STEPS = 8  # where a row that names tools does not say
# tool -> the field of a row that it works on
WORKS_ON = {"lookup": "table", "search": "documents", "sql": "script"}


def function(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    """The full schema of a tool with one argument, a string."""
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string", "description": meaning}},
        "required": [argument],
    }
    about = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": about}


SCHEMAS = {
    schema["function"]["name"]: schema
    for schema in (
        function(
            "calculator",
            "Compute the exact value of an expression in whole numbers.",
            "expression",
            "At most 60 of these characters: 0-9 + - * / ( )",
        ),
        function(
            "python",
            "Run a Python program and return what it prints. It has the standard library, no "
            "network and a few seconds; nothing is kept from one call to the next.",
            "code",
            "The whole program, which prints its result",
        ),
        function(
            "search",
            "Search the documents and return the three that fit the words best.",
            "query",
            "Words to search for, such as a name and what is wanted of it",
        ),
        function(
            "sql",
            "Run one SELECT statement on the SQLite database and return at most 50 rows, their "
            "columns separated by |.",
            "query",
            "The statement; the table sqlite_master holds the schema",
        ),
    )
}


def name_of(schema: Schema) -> str:
    """The tool's name, in either form of schema."""
    return schema.get("function", schema)["name"]


def arguments_of(schema: Schema) -> list[str]:
    """The names of its arguments, in either form of schema."""
    if "function" in schema:
        return list(schema["function"].get("parameters", {}).get("properties", {}))
    return list(schema["parameters"])


def with_schemas(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with schemas for the tools that it names, which also get STEPS turns.

    Raises UserError for a tool that is unknown, named twice or without the field that it works on,
    and for limits (`max_steps`, `tool_seconds`) out of range.
    """
    tools = row.get("tools", [])
    if not isinstance(tools, list | tuple):
        raise UserError(f"tools={tools!r:.80} must be a list of names or function schemas")
    named = [tool for tool in tools if isinstance(tool, str)]
    for name in named:
        if name not in SCHEMAS:
            raise UserError(f"tools={name!r:.80} is unknown: use some of {', '.join(SCHEMAS)}")
        if (field := WORKS_ON.get(name)) and not row.get(field):
            raise UserError(f"{field} is missing, which the tool {name} works on: add it")
    schemas = [SCHEMAS[tool] if isinstance(tool, str) else _checked(tool) for tool in tools]
    names = [name_of(schema) for schema in schemas]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"tools names {min(twice)!r:.80} twice: name each tool once")
    limits = {"max_steps": STEPS} if named else {}
    full = limits | dict(row) | {"tools": schemas}
    _check_limits(full)
    return full


def _checked(schema: Any) -> dict[str, Any]:
    try:
        named = isinstance(name_of(schema), str) and isinstance(arguments_of(schema), list)
    except (AttributeError, KeyError, TypeError):
        named = False
    if not named:
        raise UserError(f"tools={schema!r:.80} must be a tool's name or a function schema")
    return schema


def _check_limits(row: Mapping[str, Any]) -> None:
    steps, seconds = row.get("max_steps", 1), row.get("tool_seconds", 1)
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise UserError(f"max_steps={steps!r:.80} must be a whole number from 1 to {MAX_STEPS}")
    if type(seconds) not in (int, float) or not 0 < seconds < float("inf"):
        raise UserError(f"tool_seconds={seconds!r:.80} must be a number of seconds above 0")
