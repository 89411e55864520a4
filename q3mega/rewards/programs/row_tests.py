"""The tests of a program as a row gives them: read, validated, and as what `rewards.code` runs.

    {"cases": [{"stdin": "2 3", "stdout": "5"}, ["4 5", "9"]], "tolerance": 1e-6}
    {"cases": [{"stdin": "6"}], "checker": "def check(stdin, printed, expected): return ..."}
    {"entry_point": "add", "calls": [{"arguments": [2, 3], "result": 5}], "tolerance": 1e-6}
    {"entry_point": "add", "check": "def check(candidate): assert ...", "prompt": "import math ..."}

An entry point is a function, or a method of a class: `Solution().add`; `add` alone finds the method
of a class Solution, too.
"""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from q3mega.errors import UserError

_ENTRY_POINT = re.compile(r"(?:[^\W\d]\w*(?:\(\))?\.)?[^\W\d]\w*")
_FORMS = (
    "give cases (stdin, stdout), or entry_point with calls (arguments, result) or with check, and "
    "none of them empty"
)
_OPTIONS = {
    "cases": {"cases", "tolerance", "checker"},
    "calls": {"entry_point", "calls", "tolerance", "prompt"},
    "check": {"entry_point", "check", "prompt"},
}


@dataclass(frozen=True)
class Tolerance:
    """What two numbers may differ by: absolutely, or relative to the larger."""

    absolute: float
    relative: float


@dataclass(frozen=True)
class Case:
    """stdout None: only a checker can tell."""

    stdin: str
    stdout: str | None


@dataclass(frozen=True)
class Cases:
    """tolerance None: the default, for fractions alone."""

    cases: tuple[Case, ...]
    tolerance: Tolerance | None
    checker: str | None


@dataclass(frozen=True)
class Call:
    """arguments: by position, or by name."""

    arguments: Sequence[Any] | Mapping[str, Any]
    result: Any


@dataclass(frozen=True)
class Calls:
    """prompt: source that the program may count on, such as the classes of its arguments."""

    entry_point: str
    calls: tuple[Call, ...]
    tolerance: Tolerance | None
    prompt: str


@dataclass(frozen=True)
class Check:
    """check: source with `def check(candidate)`, run where `prompt` has been run."""

    entry_point: str
    check: str
    prompt: str


Tests = Cases | Calls | Check


def read(tests: Any) -> Tests:
    """The tests of a row. Raises UserError that names the field which is wrong."""
    if not isinstance(tests, Mapping):
        raise UserError(f"tests={tests!r:.80} must be an object: {_FORMS}")
    forms = [form for form in _OPTIONS if form in tests]
    if len(forms) != 1 or not tests[forms[0]] or (forms != ["cases"]) != ("entry_point" in tests):
        raise UserError(f"tests={str(tests)[:80]!r}: {_FORMS}")
    (form,) = forms
    if unknown := set(tests) - _OPTIONS[form]:
        raise UserError(
            f"tests.{min(map(str, unknown))} is no field beside tests.{form}: use "
            f"{', '.join(sorted(_OPTIONS[form]))}"
        )
    if form == "cases":
        checker = None if tests.get("checker") is None else _text(tests, "checker")
        cases = tuple(
            _case(f"tests.cases[{i}]", case, checker is not None)
            for i, case in enumerate(_list(tests, "cases"))
        )
        return Cases(cases, _tolerance(tests.get("tolerance")), checker)
    entry_point = _text(tests, "entry_point")
    if not _ENTRY_POINT.fullmatch(entry_point):
        raise UserError(
            f"tests.entry_point={entry_point!r:.80} must be a function's name, or a method's as in "
            "Solution().name"
        )
    prompt = _text(tests, "prompt") if tests.get("prompt") is not None else ""
    if form == "check":
        return Check(entry_point, _text(tests, "check"), prompt)
    calls = tuple(_call(f"tests.calls[{i}]", c) for i, c in enumerate(_list(tests, "calls")))
    return Calls(entry_point, calls, _tolerance(tests.get("tolerance")), prompt)


def check_sources(tests: Tests) -> None:
    """UserError for a check, checker or prompt of a row that is no Python, or defines no check."""
    match tests:
        case Cases(checker=str(source)):
            _defines_check("checker", source)
        case Check():
            _defines_check("check", tests.check)
            _parsed("prompt", tests.prompt)
        case Calls():
            _parsed("prompt", tests.prompt)


def literal(value: Any) -> str:
    """Python source of plain data; of integers of any length too, and of infinities.

    Raises UserError for what is no plain data.
    """
    if isinstance(value, bool | str | bytes | None):
        return repr(value)
    if isinstance(value, int):
        return hex(value)  # decimals have a limit of digits
    if isinstance(value, float):
        if math.isnan(value):
            raise UserError("NaN is no argument or result that a test can hold: leave it out")
        return repr(value) if math.isfinite(value) else f"{'-' * (value < 0)}1e999"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(k)}: {literal(v)}' for k, v in value.items())}}}"
    inner = ", ".join(map(literal, value)) if isinstance(value, list | tuple | set) else ""
    match value:
        case list():
            return f"[{inner}]"
        case tuple():
            return f"({inner},)" if value else "()"
        case set():
            return f"{{{inner}}}" if value else "set()"
    raise UserError(f"{value!r:.80} is no plain data: give numbers, texts, lists and objects")


def _case(where: str, case: Any, checked: bool) -> Case:
    if isinstance(case, list | tuple) and len(case) == 2:
        case = {"stdin": case[0], "stdout": case[1]}
    if not isinstance(case, Mapping) or not set(case) <= {"stdin", "stdout"}:
        raise UserError(f"{where}={case!r:.80} must hold stdin and stdout, or be a pair of them")
    stdin, stdout = case.get("stdin"), case.get("stdout")
    for name, text in (("stdin", stdin), ("stdout", stdout)):
        if not isinstance(text, str) and not (name == "stdout" and text is None and checked):
            raise UserError(f"{where}.{name}={text!r:.80} must be a text")
    return Case(str(stdin), stdout)


def _call(where: str, call: Any) -> Call:
    if not isinstance(call, Mapping) or set(call) != {"arguments", "result"}:
        raise UserError(f"{where}={call!r:.80} must hold arguments and result, and nothing else")
    arguments = call["arguments"]
    named = isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments)
    if not named and not isinstance(arguments, list | tuple):
        raise UserError(
            f"{where}.arguments={arguments!r:.80} must be a list, or an object of names and values"
        )
    for name in ("arguments", "result"):
        try:
            literal(call[name])
        except (UserError, RecursionError) as error:
            raise UserError(f"{where}.{name}: {error}") from error
    return Call(arguments, call["result"])


def _tolerance(given: Any) -> Tolerance | None:
    if given is None:
        return None
    both = given if isinstance(given, Mapping) else {"abs": given, "rel": given}
    numbers = [
        value for value in both.values() if type(value) in (int, float) and 0 <= value < math.inf
    ]
    if not both or set(both) - {"abs", "rel"} or len(numbers) < len(both):
        raise UserError(
            f"tests.tolerance={given!r:.80} must be a number of 0 or more, or such numbers as "
            "abs and rel"
        )
    return Tolerance(float(both.get("abs", 0)), float(both.get("rel", 0)))


def _text(tests: Mapping[str, Any], name: str) -> str:
    if not isinstance(tests[name], str):
        raise UserError(f"tests.{name}={tests[name]!r:.80} must be a text")
    return str(tests[name])


def _list(tests: Mapping[str, Any], name: str) -> Sequence[Any]:
    if not isinstance(tests[name], list | tuple):
        raise UserError(f"tests.{name}={tests[name]!r:.80} must be a list")
    return tests[name]  # type: ignore[no-any-return]


def _parsed(name: str, source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"tests.{name} is no Python ({error}): {source[:60]!r}") from error


def _defines_check(name: str, source: str) -> None:
    functions = (node for node in _parsed(name, source).body if isinstance(node, ast.FunctionDef))
    if not any(node.name == "check" for node in functions):
        arguments = "candidate" if name == "check" else "stdin, printed, expected"
        raise UserError(f"tests.{name} must define check({arguments}): {source[:60]!r}")
