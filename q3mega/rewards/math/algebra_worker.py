"""The worker of `algebra`: reads [reference, given] a line, writes true or false a line.

Run by path in a process of its own, confined, so it imports nothing of this package; its arguments
are the folders of the packages that it needs. It limits its processor time for each question: a
parent that was killed cannot stop it any more.
"""

import json
import logging
import os
import resource
import sys
from typing import Any

SOFT_SECONDS = 2  # math-verify's own limit, by signals, for parsing each side and for comparing
CPU_SECONDS = 20  # for one question; the parent's limit is what cuts, this one ends an orphan
DIGITS = 40


def main() -> None:
    """Answer lines of JSON until the input ends."""
    sys.path += sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    answers = os.fdopen(os.dup(1), "w")
    import math_verify  # noqa: F401  (a second; a failure is told on stderr, while it is heard)

    logging.disable()
    sys.set_int_max_str_digits(0)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    print("ready", file=answers, flush=True)
    os.dup2(silence, 2)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
        print(json.dumps(same(*json.loads(line))), file=answers, flush=True)


def same(reference: str, given: str) -> bool:
    """Whether math-verify finds two pieces of LaTeX equal. An error of any kind is a no."""
    from math_verify import verify

    try:
        gold, target = parsed(reference), parsed(given)
        return (
            gold is not None
            and target is not None
            and not differ(gold, target)
            and verify(gold, target, timeout_seconds=SOFT_SECONDS)
        )
    except (Exception, MemoryError):  # whatever the text does to sympy, it is not the answer
        return False


def parsed(latex: str) -> Any:
    """The expression, or None. Equations are over the complex numbers, or all those without a real
    solution would be the same."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Eq, Symbol

    config = [LatexExtractionConfig()]  # the other one picks any number out of what is malformed
    expressions = parse(
        f"${latex}$", config, fallback_mode="no_fallback", parsing_timeout=SOFT_SECONDS
    )
    if len(expressions) != 1:
        return None
    (expression,) = expressions
    if isinstance(expression, Eq):
        return expression.xreplace({s: Symbol(s.name) for s in expression.free_symbols})
    return expression


def differ(gold: Any, target: Any) -> bool:
    """Whether two expressions have different values at a point: math-verify takes what is below
    1e-15 for zero, 1/2004! and 1/2006! for the same."""
    from sympy import Expr, N, Rational, simplify

    if not (isinstance(gold, Expr) and isinstance(target, Expr)):
        return False
    symbols = sorted(gold.free_symbols | target.free_symbols, key=str)
    point = {s: Rational(17 + 6 * i, 13 + i) for i, s in enumerate(symbols)}
    a, b = (N(e.subs(point).doit(), DIGITS) for e in (gold, target))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return False  # an unknown function, say
    size = max(abs(a), abs(b))
    if size < 10**-DIGITS:  # zero, or noise, or truly that small
        return bool(simplify((gold - target).doit()) != 0)
    return bool(abs(a - b) > size / 10 ** (DIGITS // 2))


if __name__ == "__main__":
    main()
