"""Programs against tests, in the sandbox: what a program prints, or what its function returns.

A row's `tests` are one of

    {"cases": [{"stdin": "2 3", "stdout": "5"}, ...]}
    {"entry_point": "add", "calls": [{"arguments": [2, 3], "result": 5}, ...]}
    {"entry_point": "add", "check": "def check(candidate): assert ...", "prompt": "import math ..."}

and `check` is HumanEval's form (2107.03374). A function is never called where its tests are: the
program runs in one sandbox and gets calls as literals, the tests run in another and see nothing of
the program but the literals that come back. So a program that exits early, overrides equality or
looks for the tests finds nothing to gain by it.
"""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from q3mega.errors import UserError
from q3mega.rewards import Verdict, reward
from q3mega.rewards.mode import reply
from q3mega.rewards.sandbox import Limits, Outcome, run, started

_BLOCK = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
MAX_CHARACTERS = 100_000  # of a program

# What both processes share: values as literals, those of subclasses (Counter) as their base's.
_PLAIN = """
import ast, math, os, sys
sys.setrecursionlimit(10_000)
class Infinity:
    def __init__(self, value):
        self.text = "1e999" if value > 0 else "-1e999"
    def __repr__(self):
        return self.text
def plain(value):
    if isinstance(value, float) and math.isinf(value):
        return Infinity(value)
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, (kind, frozenset) if kind is set else kind):
            return kind(map(plain, value))
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
"""

# What a program's process does: reads the program, then a line with the arguments of each call.
# Descriptors are moved first, so that what the program prints does not get between the results.
_SERVE = f"""{_PLAIN}
calls, results = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
with open(os.devnull, "r+b", buffering=0) as nothing:
    os.dup2(nothing.fileno(), 0)
    os.dup2(nothing.fileno(), 1)
space = {{"__name__": "program"}}
exec(compile(PROGRAM, "main.py", "exec"), space)
for line in calls:
    try:
        answer = ("returned", plain(space[ENTRY](*ast.literal_eval(line))))
    except Exception as error:
        answer = ("raised", type(error).__name__ + ": " + str(error)[:200])
    print(repr(answer), file=results, flush=True)
"""

# What the tests' process does. A result is a literal or nothing: objects of the program's own
# classes, which could be equal to everything, have no way to get here.
_ASK = f"""{_PLAIN}
results, calls = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def candidate(*arguments):
    print(repr(plain(arguments)), file=calls, flush=True)
    line = results.readline()
    if not line:
        raise SystemExit("the program ended")
    how, value = ast.literal_eval(line)
    if how == "raised":
        raise RuntimeError(value)
    return value
space = {{"__name__": "tests"}}
exec(compile(PROMPT, "prompt.py", "exec"), space)
space[ENTRY] = candidate  # a few of HumanEval's tests call it by its name
exec(compile(CHECK, "check.py", "exec"), space)
space["check"](candidate)
"""

# The check of a table of calls. JSON knows no tuples, so they count as lists.
_TABLE = """
def lists(value):
    return [lists(v) for v in value] if isinstance(value, (list, tuple)) else value
def check(candidate):
    for number, (arguments, result) in enumerate(CALLS, 1):
        found = candidate(*arguments)
        if lists(found) != lists(result):
            raise SystemExit(f"call {number} returned {found!r:.60} for {result!r:.60}")
"""


@reward("code")
def code(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 when the program in the reply's last ```python block, or the whole reply without one,
    passes all of row["tests"]; else 0, with the first thing that went wrong.

    row["limits"]: fields of sandbox.Limits, for each process. Raises UserError for malformed tests.
    """
    failure, limits = _tester(row["tests"]), Limits(**row.get("limits", {}))
    text = reply(completion)
    if text is None:
        return Verdict(0.0, "think block malformed or never closed")
    blocks = _BLOCK.findall(text)
    program = blocks[-1] if blocks else text
    if not program.strip() or len(program) > MAX_CHARACTERS:
        return Verdict(0.0, "a program too long" if program.strip() else "no program")
    problem = failure(program, limits)
    return Verdict(1.0, "all tests passed") if problem is None else Verdict(0.0, problem)


def _tester(tests: Mapping[str, Any]) -> Callable[[str, Limits], str | None]:
    """What says in a line what a program does wrong, or None if it passes."""
    match dict(tests):
        case {"cases": [_, *_] as cases, **rest} if not rest:
            return partial(_first_wrong_output, cases)
        case {"entry_point": str(name), "calls": [_, *_] as calls, **rest} if not rest:
            table = [(c["arguments"], c["result"]) for c in calls]
            return partial(_failed_check, name, f"inf = 1e999\nCALLS = {table!r}\n{_TABLE}", "")
        case {"entry_point": str(name), "check": str(check), **rest} if rest.keys() <= {"prompt"}:
            return partial(_failed_check, name, check, rest.get("prompt", ""))
    raise UserError(
        f"tests={str(tests)[:100]!r}: give cases (stdin, stdout), or entry_point with calls "
        "(arguments, result) or with check, and none of them empty"
    )


def _first_wrong_output(cases: list[Mapping[str, str]], program: str, limits: Limits) -> str | None:
    for number, case in enumerate(cases, 1):
        found = run(program, case["stdin"], limits)
        if found.status != "ok":
            return f"test {number}: {found.reason}"
        if _lines(found.stdout) != _lines(case["stdout"]):
            return f"test {number}: printed {found.stdout[:40]!r} for {case['stdout'][:40]!r}"
    return None


def _lines(text: str) -> list[str]:
    """Without blanks at the ends of lines and empty lines at the end, as contests compare."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _failed_check(
    entry_point: str, check: str, prompt: str, program: str, limits: Limits
) -> str | None:
    """Both processes, each reading what the other writes."""
    serve = f"PROGRAM, ENTRY = {program!r}, {entry_point!r}\n{_SERVE}"
    ask = f"PROMPT, CHECK, ENTRY = {prompt!r}, {check!r}, {entry_point!r}\n{_ASK}"
    calls, call = os.pipe()
    results, result = os.pipe()
    ends = [calls, call, results, result]
    try:
        with (
            started(serve, limits, calls, result) as server,
            started(ask, limits, results, call) as tests,
        ):
            while ends:  # each pipe has to end when its writer does
                os.close(ends.pop())
            asked = tests.wait()
            if asked.status == "ok":
                return None
            served = server.wait()
    finally:
        for end in ends:
            os.close(end)
    return _blame(served, asked)


def _blame(served: Outcome, asked: Outcome) -> str:
    """The program's own end, if it had a bad one, says more than the test that missed it."""
    return f"program: {served.reason}" if served.status != "ok" else f"tests: {asked.reason}"
