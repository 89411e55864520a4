"""Tools with a real environment, for episodes of several turns.

A tool call is untrusted text: the calculator walks a syntax tree of four operators, programs run
in the sandbox, SQL reads a database in memory and nothing else, and whatever is wrong with a call
comes back to the model as text.
"""

import ast
import operator
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from q3mega.data.chat import parse
from q3mega.data.tasks import Problem
from q3mega.data.tasks.general import CALCULATOR, LOOKUP, tool
from q3mega.rewards import sandbox

MAX_CALLS = 4  # of one turn are answered
MAX_RESULT = 2000  # characters of a tool's answer
MAX_HITS = 3  # documents that a search finds
PYTHON, SEARCH, SQL = tool("python", "code"), tool("search", "query"), tool("sql", "query")
_SQL_STEPS = 100_000  # instructions of SQLite's machine between two looks at the budget
_SQL_LOOKS = 100  # some seconds
_SQL_READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
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


def python() -> Tool:
    """What a program prints, in the sandbox. Raises UserError where nothing confines it."""

    def run(code: str) -> str:
        found = sandbox.run(code)
        printed = found.stdout.strip()[:MAX_RESULT]
        return printed if found.status == "ok" else f"{printed}\nerror: {found.reason}".strip()

    return TextTool(PYTHON, run)


def search(documents: Sequence[str]) -> Tool:
    """The documents that fit a query best, by BM25 over their words (SQLite's FTS5)."""
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("create virtual table corpus using fts5(text)")
    database.executemany("insert into corpus values (?)", ((text,) for text in documents))

    def run(query: str) -> str:
        # Words in quotes, so that none is taken for an operator of the query language.
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query)[:32])
        if not words:
            return "error: give words to search for"
        hits = database.execute(
            "select text from corpus where corpus match ? order by rank limit ?", (words, MAX_HITS)
        )
        return "\n\n".join(text for (text,) in hits)[:MAX_RESULT] or "nothing found"

    return TextTool(SEARCH, run)


def sql(script: str) -> Tool:
    """Rows that a SELECT finds in the database which `script` makes (from the task, trusted).

    The model's query may read and compute, for some seconds and with values of up to a megabyte.
    """
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.executescript(script)
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1 << 20)
    database.set_authorizer(
        lambda action, *names: (
            sqlite3.SQLITE_OK
            if action in _SQL_READS and "load_extension" not in names
            else sqlite3.SQLITE_DENY
        )
    )
    looks = 0

    def over_budget() -> bool:
        nonlocal looks
        looks += 1
        return looks > _SQL_LOOKS

    database.set_progress_handler(over_budget, _SQL_STEPS)

    def run(query: str) -> str:
        nonlocal looks
        looks = 0
        try:
            found = database.execute(query)
            if found.description is None:
                return "error: not a query"
            rows = found.fetchmany(50)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: a NUL
            return f"error: {error}"
        return "\n".join(" | ".join(map(str, row)) for row in rows)[:MAX_RESULT] or "no rows"

    return TextTool(SQL, run)


TOOLS: dict[str, Callable[[Problem], Tool]] = {
    "calculator": lambda problem: calculator(),
    "lookup": lambda problem: lookup(problem.meta["table"]),
    "python": lambda problem: python(),
    "search": lambda problem: search(problem.meta["documents"]),
    "sql": lambda problem: sql(problem.meta["script"]),
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
