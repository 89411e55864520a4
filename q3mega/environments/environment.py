"""Environments of several turns: the tools of one problem, and what they answer.

A tool call is untrusted text. Whatever is wrong with it comes back to the model as text.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from q3mega.data.chat import parse
from q3mega.data.tagged import HALF_PAIR
from q3mega.data.tool_schemas import MAX_STEPS, WORKS_ON, arguments_of, name_of
from q3mega.environments.calculator import calculate
from q3mega.environments.python.tool import python
from q3mega.environments.search.tool import search
from q3mega.environments.sql.tool import sql
from q3mega.environments.tool import RunText, TextTool, Tool, shorten
from q3mega.problems import Problem
from q3mega.rewards import reward_names, reward_of

MAX_CALLS = 4  # of one turn are answered
DEFAULT_STEPS = 2  # turns with calls, where the problem does not say
TOOL_SECONDS = 30.0  # in tools, of an episode, where the problem does not say
CALL_REWARDS = {"tool_call", "tool_calls"}  # judge the calls themselves: no tool runs
OVER = "That was the last call. Answer now."
LATE = "error: no time is left for tools"


def lookup(table: Mapping[str, str]) -> RunText:
    """The values of a table that only the environment holds."""
    return lambda key: table.get(key, "error: no such key")


def _text(problem: Problem, name: str, run: RunText) -> Tool:
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

    max_steps: turns with calls; by default the problem's `max_steps`, else DEFAULT_STEPS.
    The problem's `tool_seconds` (default TOOL_SECONDS) bound the time in tools, which is looked at
    before each call. Raises UserError for data that the problem's tools cannot work on.
    """

    def __init__(self, problem: Problem, max_steps: int | None = None) -> None:
        self.tools = {name: TOOLS[name](problem) for name in map(name_of, problem.tools)}
        steps = problem.meta.get("max_steps", DEFAULT_STEPS) if max_steps is None else max_steps
        self.steps_left = min(steps, MAX_STEPS)
        self.seconds_left = problem.meta.get("tool_seconds", TOOL_SECONDS)

    def step(self, text: str) -> list[dict[str, Any]] | None:
        """Tool messages to append to the chat, one a call; None when the episode is over.

        It is over when the turn calls nothing, or when no step is left. When the last step or the
        time for tools is used up, one more message says that an answer is due.
        """
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
        start = time.monotonic()
        try:
            return HALF_PAIR.sub("\ufffd", shorten(tool.call(call["arguments"])))
        except Exception as error:  # whatever it is, the other episodes go on
            return f"error: the tool failed ({type(error).__name__})"
        finally:
            self.seconds_left -= time.monotonic() - start


def environment_of(problem: Problem) -> Environment | None:
    """The environment of a problem whose tools all run here, else None.

    A problem has none, either, where its reward judges the calls themselves.
    """
    judged_by_answer = CALL_REWARDS.isdisjoint(reward_names(reward_of(problem)))
    runnable = (
        judged_by_answer
        and problem.tools
        and all(
            name_of(schema) in TOOLS
            and len(arguments_of(schema)) == 1
            and WORKS_ON.get(name_of(schema)) in {None, *problem.meta}
            for schema in problem.tools
        )
    )
    return Environment(problem) if runnable else None
