"""Tools with a real environment, and the multi-turn episode that uses them.

A tool call is untrusted text: the calculator walks a syntax tree of four operators, nothing is
evaluated.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

from q3mega.data.chat import parse
from q3mega.data.tasks import Problem

MAX_EXPRESSION = 60  # characters
MAX_VALUE = 10**12
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def calculate(expression: str) -> str:
    """The value of an expression in integers, + - * // and parentheses; "error: ..." otherwise."""
    if len(expression) > MAX_EXPRESSION:
        return f"error: longer than {MAX_EXPRESSION} characters"
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: use integers, + - * // and parentheses"


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError
    if abs(value) > MAX_VALUE:
        raise ValueError
    return value


class Environment:
    """One problem's tools. `step` answers an assistant turn, or ends the episode."""

    def __init__(self, problem: Problem, max_calls: int = 2) -> None:
        self.problem, self.calls_left = problem, max_calls

    def step(self, text: str) -> list[dict[str, Any]] | None:
        """Tool messages to append to the chat; None when the turn called nothing, or too often."""
        calls = parse(text).tool_calls
        if not calls or self.calls_left == 0:
            return None
        self.calls_left -= 1
        return [{"role": "tool", "content": self._call(calls[0])}]

    def _call(self, call: dict[str, Any]) -> str:
        for tool in self.problem.tools:
            (argument,) = tool["parameters"]
            if call["name"] == tool["name"] and set(call["arguments"]) == {argument}:
                value = str(call["arguments"][argument])
                if tool["name"] == "calculator":
                    return calculate(value)
                return self.problem.meta["table"].get(value, "error: no such key")
        return "error: no such tool or argument"
