"""Tools with a real environment, for episodes of several turns.

A tool call is untrusted text: the calculator walks a syntax tree of four operators, nothing is
evaluated, and whatever is wrong with a call comes back to the model as text.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from q3mega.data.chat import parse
from q3mega.data.tasks import Problem
from q3mega.data.tasks.general import CALCULATOR, LOOKUP

MAX_CALLS = 4  # of one turn are answered
_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,60}")
_MAX_VALUE = 10**12
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Tool(Protocol):
    """What the environment can call: a name and a schema for the prompt, text in, text out."""

    @property
    def name(self) -> str: ...

    @property
    def schema(self) -> Mapping[str, Any]: ...

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The result as text; "error: ..." for arguments that do not fit."""


@dataclass(frozen=True)
class TextTool:
    """A tool with one argument, a string."""

    schema: Mapping[str, Any]
    run: Callable[[str], str]

    @property
    def name(self) -> str:
        return self.schema["name"]

    def call(self, arguments: Mapping[str, Any]) -> str:
        (argument,) = self.schema["parameters"]
        if set(arguments) != {argument} or not isinstance(arguments[argument], str):
            return f"error: give {argument} as a string"
        return self.run(arguments[argument])


def calculate(expression: str) -> str:
    """The exact value of an expression in integers, + - * / and parentheses; "error: ..." else.

    At most 60 characters and 10^12 in any intermediate value. A fraction is rounded to 6 digits.
    """
    if not _EXPRESSION.fullmatch(expression):
        return "error: use up to 60 of 0-9 + - * / ( )"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: the numbers are too large"
    except (SyntaxError, ValueError):
        return "error: not an expression in + - * / and parentheses"
    return str(value.numerator if value.denominator == 1 else round(float(value), 6))


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        value = Fraction(node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:  # a power, a floor division, a call such as 2(3), a tuple
        raise ValueError
    if abs(value) > _MAX_VALUE:
        raise OverflowError
    return value


def calculator() -> Tool:
    """`calculate` as a tool."""
    return TextTool(CALCULATOR, calculate)


def lookup(table: Mapping[str, str]) -> Tool:
    """The values of a table that only the environment holds."""
    return TextTool(LOOKUP, lambda key: table.get(key, "error: no such key"))


TOOLS: dict[str, Callable[[Problem], Tool]] = {
    "calculator": lambda problem: calculator(),
    "lookup": lambda problem: lookup(problem.meta["table"]),
}


class Environment:
    """The tools of one problem. `step` answers an assistant's turn, or ends the episode."""

    def __init__(self, problem: Problem, max_steps: int = 2) -> None:
        self.tools = {t["name"]: TOOLS[t["name"]](problem) for t in problem.tools}
        self.steps_left = max_steps

    def step(self, text: str) -> list[dict[str, Any]] | None:
        """Tool messages to append to the chat, one a call; None when the episode is over: the turn
        called nothing, or there were `max_steps` turns with calls before it."""
        message = parse(text)
        replies = [self._call(c) for c in message.tool_calls[:MAX_CALLS]]
        if "<tool_call>" in message.content:
            replies.append("error: a call is a JSON object with name and arguments")
        if not replies or self.steps_left == 0:
            return None
        self.steps_left -= 1
        return [{"role": "tool", "content": reply} for reply in replies]

    def _call(self, call: Mapping[str, Any]) -> str:
        tool = self.tools.get(call["name"])
        return tool.call(call["arguments"]) if tool else "error: no such tool"
