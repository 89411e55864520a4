"""What an environment calls: a tool with a name, a schema and a text for an answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from q3mega.data.tool_schemas import Schema, arguments_of, name_of

MAX_RESULT_CHARACTERS = 2000
CUT = "\n[cut here: too long]"
RunText = Callable[[str], str]  # from a tool's one argument to its result


class Tool(Protocol):
    """What an environment can call."""

    @property
    def name(self) -> str:
        """What the model calls it by."""

    @property
    def schema(self) -> Schema:
        """Its JSON schema in the prompt."""

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The result as text; "error: ..." for arguments that do not fit."""


@dataclass(frozen=True)
class TextTool:
    """A tool with one argument, a string, that its schema names."""

    schema: Schema
    run: RunText

    @property
    def name(self) -> str:
        """See `Tool`."""
        return name_of(self.schema)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """See `Tool`."""
        (argument,) = arguments_of(self.schema)
        if set(arguments) != {argument} or not isinstance(arguments[argument], str):
            return f"error: give {argument} as a string"
        return self.run(arguments[argument])


def shorten(text: str, limit: int = MAX_RESULT_CHARACTERS) -> str:
    """At most `limit` characters of a text. What is cut ends with CUT."""
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT
