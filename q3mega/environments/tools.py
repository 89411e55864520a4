"""Tools with a real environment, for episodes of several turns.

A tool call is untrusted text: the calculator walks a syntax tree of four operators, programs run
in the sandbox, SQL reads a database in memory in a confined process, and whatever is wrong with a
call comes back to the model as text.
"""

import ast
import operator
import re
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from q3mega.data.chat import parse
from q3mega.data.tagged import HALF_PAIR
from q3mega.data.tool_schemas import MAX_STEPS, WORKS_ON, Schema, arguments_of, name_of
from q3mega.errors import UserError
from q3mega.problems import Problem
from q3mega.rewards import reward_of
from q3mega.sandbox import confined
from q3mega.sandbox.worker import Worker

MAX_CALLS = 4  # of one turn are answered
MAX_RESULT = 2000  # characters of a tool's answer
CUT = "\n[cut here: too long]"
MAX_HITS = 3  # documents that a search finds
STEPS = 2  # turns with calls, where the problem does not say
SECONDS = 30.0  # in tools, of an episode
OVER = "That was the last call. Answer now."
JUDGE_CALLS = {"tool_call", "tool_calls"}  # rewards
LATE = "error: no time is left for tools"
SQL_SECONDS = 5.0  # of a query, then its process is ended
_SQL_MAIN = str(Path(__file__).with_name("sql_worker.py"))
_SQL = Worker(
    "SQL",
    (confined.interpreter(), "-I", "-S", "-B", "-X", "utf8", _SQL_MAIN),
    (_SQL_MAIN,),
    # It sees to its own CPU time and writes nothing.
    confined.Limits(cpu=10**9, wall=1e9, memory=1 << 30, output=0, scratch=1 << 12),
    SQL_SECONDS,
)
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
    def schema(self) -> Schema: ...

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The result as text; "error: ..." for arguments that do not fit."""


@dataclass(frozen=True)
class TextTool:
    """A tool with one argument, a string, that its schema names."""

    schema: Schema
    run: Callable[[str], str]

    @property
    def name(self) -> str:
        return name_of(self.schema)

    def call(self, arguments: Mapping[str, Any]) -> str:
        (argument,) = arguments_of(self.schema)
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


Run = Callable[[str], str]


def lookup(table: Mapping[str, str]) -> Run:
    """The values of a table that only the environment holds."""
    return lambda key: table.get(key, "error: no such key")


def python() -> Run:
    """What a program prints, in the sandbox. Raises UserError where nothing confines it."""
    confined.confinement()

    def run(code: str) -> str:
        found = confined.run(code)
        printed = found.stdout.strip()
        if found.status == "ok":
            return printed
        error = f"error: {found.reason}"
        return f"{_cut(printed, MAX_RESULT - len(error) - 1)}\n{error}".strip()

    return run


def _cut(text: str, most: int = MAX_RESULT) -> str:
    return text if len(text) <= most else text[: most - len(CUT)] + CUT


def search(documents: Sequence[str]) -> Run:
    """The documents that fit a query best, by BM25 over their words (SQLite's FTS5).

    Raises UserError for documents that are no list of texts.
    """
    if not (isinstance(documents, list | tuple) and all(isinstance(d, str) for d in documents)):
        raise UserError(f"documents={documents!r:.80} must be a list of texts")
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
        return "\n\n".join(text for (text,) in hits) or "nothing found"

    return run


def sql(script: str) -> Run:
    """Rows that a SELECT finds in the database which `script` makes, in memory.

    The model's query may read and compute, for some seconds and with values of up to a megabyte;
    the script may write too. Both run in a confined process, which is ended where SQLite looks at
    no budget. Raises UserError for a script that fails, takes longer or does anything else, and
    where nothing confines it.
    """
    if not isinstance(script, str):
        raise UserError(f"script={script!r:.80} makes no database (no text): give SQL statements")
    with _SQL.asking() as ask:
        made = ask({"script": script, "query": None})
    if made is None or "wrong" in made:
        why = "it takes too long or too much memory" if made is None else made["wrong"]
        raise UserError(f"script={script!r:.80} makes no database ({why}): correct it")

    def run(query: str) -> str:
        with _SQL.asking() as ask:
            reply = ask({"script": script, "query": query})
        if reply is None:
            return "error: the query takes too long or too much memory"
        return str(reply["text"]) if "text" in reply else f"error: {reply['wrong']}"

    return run


def _text(problem: Problem, name: str, run: Run) -> Tool:
    """The tool as the problem's prompt shows it."""
    (schema,) = [schema for schema in problem.tools if name_of(schema) == name]
    return TextTool(schema, run)


TOOLS: dict[str, Callable[[Problem], Tool]] = {
    "calculator": lambda p: _text(p, "calculator", calculate),
    "lookup": lambda p: _text(p, "lookup", lookup(p.meta["table"])),
    "python": lambda p: _text(p, "python", python()),
    "search": lambda p: _text(p, "search", search(p.meta["documents"])),
    "sql": lambda p: _text(p, "sql", sql(p.meta["script"])),
}


class Environment:
    """The tools of one problem. `step` answers an assistant's turn, or ends the episode.

    max_steps: turns with calls, by default the problem's own (meta), else STEPS. The problem's
    `tool_seconds` bound the time spent in tools, looked at before each call.
    Raises UserError for what the problem's tools cannot work on.
    """

    def __init__(self, problem: Problem, max_steps: int | None = None) -> None:
        self.tools = {name: TOOLS[name](problem) for name in map(name_of, problem.tools)}
        steps = problem.meta.get("max_steps", STEPS) if max_steps is None else max_steps
        self.steps_left = min(steps, MAX_STEPS)
        self.seconds_left = problem.meta.get("tool_seconds", SECONDS)

    def step(self, text: str) -> list[dict[str, Any]] | None:
        """Tool messages to append to the chat, one a call; None when the episode is over: the turn
        called nothing, or no step was left. With the last step, or the time for tools used up,
        another message says that an answer is due."""
        message = parse(text)
        malformed = "<tool_call>" in message.content
        if self.steps_left == 0 or not (message.tool_calls or malformed):
            return None
        replies = [self._call(c) for c in message.tool_calls[:MAX_CALLS]]
        if malformed:
            replies.append("error: a call is a JSON object with name and arguments")
        self.steps_left = self.steps_left - 1 if self.seconds_left > 0 else 0
        if self.steps_left == 0:
            replies.append(OVER)
        return [{"role": "tool", "content": reply} for reply in replies]

    def _call(self, call: Mapping[str, Any]) -> str:
        tool = self.tools.get(call["name"])
        if tool is None:
            return "error: no such tool"
        if self.seconds_left <= 0:
            return LATE
        begun = time.monotonic()
        try:
            return HALF_PAIR.sub("\ufffd", _cut(tool.call(call["arguments"])))
        except Exception as error:  # whatever it is, the other episodes go on
            return f"error: the tool failed ({type(error).__name__})"
        finally:
            self.seconds_left -= time.monotonic() - begun


def environment(problem: Problem) -> Environment | None:
    """The environment of a problem all of whose tools can be run here; None where there is none,
    as for a schema of one's own, and where the reward judges the calls themselves."""
    names = reward_of(problem)
    by_answer = JUDGE_CALLS.isdisjoint([names] if isinstance(names, str) else names)
    runnable = (
        by_answer
        and problem.tools
        and all(
            name_of(schema) in TOOLS
            and len(arguments_of(schema)) == 1
            and WORKS_ON.get(name_of(schema)) in {None, *problem.meta}
            for schema in problem.tools
        )
    )
    return Environment(problem) if runnable else None
