"""Programs against tests, in the sandbox: what a program prints, or what its function returns.

`extraction` says which text of a reply is the program, `row_tests` what a row's
tests may be (`check` is HumanEval's form, 2107.03374). A program that exits early, overrides
equality or looks for the tests finds nothing to gain by it: they run in another process
(`rewards.harness`).
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from q3mega.errors import UserError
from q3mega.rewards.mode import reply
from q3mega.rewards.programs import harness, row_tests
from q3mega.rewards.programs.extraction import program
from q3mega.rewards.programs.row_tests import Calls, Case, Cases, Check, Tests, Tolerance, literal
from q3mega.rewards.registry import Verdict, reward
from q3mega.sandbox import Limits, Outcome, limits_of, run, started

MAX_CHARACTERS = 100_000  # of a program
TOLERANCE = Tolerance(1e-6, 1e-6)  # of fractions, where a row does not say: contests' usual one
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_BLANKS = re.compile(r"(\s+)")


@reward("code")
def code(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 when the program in the reply passes all of row["tests"]; else 0, with the first thing that
    went wrong.

    row["limits"]: fields of sandbox.Limits, for each process. Raises UserError for tests and limits
    that are malformed.
    """
    tests, limits = _read(row)
    text = reply(completion)
    if text is None:
        return Verdict(0.0, "think block malformed or never closed")
    name = None if isinstance(tests, Cases) else tests.entry_point
    source = program(text, name and name.rpartition(".")[2])
    if source is None or not source.strip():
        return Verdict(0.0, "no program")
    if len(source) > MAX_CHARACTERS:
        return Verdict(0.0, "a program too long")
    problem = _failure(tests, source, limits)
    return Verdict(1.0, "all tests passed") if problem is None else Verdict(0.0, problem)


def check_tests(row: Mapping[str, Any]) -> None:
    """UserError that names what is wrong in a row's tests and limits. Nothing is run."""
    tests, _ = _read(row)
    row_tests.check_sources(tests)


def _read(row: Mapping[str, Any]) -> tuple[Tests, Limits]:
    if row.get("tests") is None:
        raise UserError("tests is missing, which the reward code runs a program against: add it")
    return row_tests.read(row["tests"]), limits_of(row.get("limits") or {})


def _failure(tests: Tests, source: str, limits: Limits) -> str | None:
    """What a program does wrong, in a line, or None if it passes."""
    match tests:
        case Cases():
            return _wrong_output(tests, source, limits)
        case Check():
            return _failed_check(tests.check, tests, source, limits)
        case Calls(tolerance=tolerance):
            calls = [
                ((), c.arguments, c.result)
                if isinstance(c.arguments, Mapping)
                else (c.arguments, {}, c.result)
                for c in tests.calls
            ]
            allowed = tolerance or TOLERANCE
            check = harness.table(
                literal(calls), allowed.absolute, allowed.relative, tolerance is not None
            )
            return _failed_check(check, tests, source, limits)


def _wrong_output(tests: Cases, source: str, limits: Limits) -> str | None:
    printed = []
    for number, case in enumerate(tests.cases, 1):
        outcome = run(source, case.stdin, _with_room(limits, case))
        if outcome.status != "ok":
            return f"test {number}: {outcome.reason}"
        printed.append(outcome.stdout)
        if tests.checker is None:
            expected = case.stdout or ""
            if not same_output(outcome.stdout, expected, tests.tolerance):
                return f"test {number}: printed {outcome.stdout[:40]!r} for {expected[:40]!r}"
    if tests.checker is None:
        return None
    seen = [(c.stdin, text, c.stdout) for c, text in zip(tests.cases, printed, strict=True)]
    outcome = run(harness.judging(tests.checker, literal(seen)), limits=limits)
    return None if outcome.status == "ok" else outcome.reason.removeprefix("exit 1: ")


def _with_room(limits: Limits, case: Case) -> Limits:
    """Limits under which the right output can be printed."""
    needed = 2 * len((case.stdout or "").encode("utf-8", "replace"))
    return replace(limits, output=max(limits.output, needed))


def same_output(printed: str, expected: str, tolerance: Tolerance | None = None) -> bool:
    """Whether two outputs are equal but for blanks at the ends of lines and empty lines at the end,
    and numbers that differ in notation (5.0 for 5) or by the tolerance.

    tolerance None: TOLERANCE for an expected fraction; an expected integer is met exactly. A
    tolerance that is given is for all numbers; of 0, all text is compared as it stands.
    """
    lines = [text.rstrip().split("\n") for text in (printed, expected)]
    return len(lines[0]) == len(lines[1]) and all(
        a == b or a.rstrip() == b.rstrip() or _same_line(a.rstrip(), b.rstrip(), tolerance)
        for a, b in zip(*lines, strict=True)
    )


def _same_line(printed: str, expected: str, tolerance: Tolerance | None) -> bool:
    if tolerance == Tolerance(0, 0):
        return False
    pieces, expected_pieces = _BLANKS.split(printed), _BLANKS.split(expected)
    return len(pieces) == len(expected_pieces) and all(
        a == b or _same_number(a, b, tolerance)
        for a, b in zip(pieces, expected_pieces, strict=True)
    )


def _same_number(printed: str, expected: str, tolerance: Tolerance | None) -> bool:
    if not (_NUMBER.fullmatch(printed) and _NUMBER.fullmatch(expected)):
        return False
    integers = [_INTEGER.fullmatch(text) is not None for text in (printed, expected)]
    if tolerance is None and integers[1]:
        return not integers[0] and Decimal(printed) == Decimal(expected)
    allowed = tolerance or TOLERANCE
    return math.isclose(
        float(printed), float(expected), rel_tol=allowed.relative, abs_tol=allowed.absolute
    )


def _failed_check(check: str, tests: Calls | Check, source: str, limits: Limits) -> str | None:
    """Both processes, each reading what the other writes."""
    serve = harness.serving(source, tests.entry_point, tests.prompt)
    ask = harness.asking(check, tests.entry_point, tests.prompt)
    calls, call = os.pipe()
    results, result = os.pipe()
    ends = [calls, call, results, result]
    try:
        with (
            started(serve, limits, calls, result) as server,
            started(ask, limits, results, call) as asker,
        ):
            while ends:  # each pipe has to end when its writer does
                os.close(ends.pop())
            tests_outcome = asker.wait()
            if tests_outcome.status == "ok":
                return None
            program_outcome = server.wait()
    finally:
        for end in ends:
            os.close(end)
    return _blame(program_outcome, tests_outcome)


def _blame(program_outcome: Outcome, tests_outcome: Outcome) -> str:
    """The program's own end, if it had a bad one, says more than the test that missed it."""
    if program_outcome.status != "ok":
        return f"program: {program_outcome.reason}"
    return f"tests: {tests_outcome.reason}"
