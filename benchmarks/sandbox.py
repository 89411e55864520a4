"""Runs a second of model-written programs, by confinement and by kind of test, and of math-verify.

    python benchmarks/sandbox.py [--seconds 5]

Each row keeps as many programs going as the machine has cores; math-verify has one worker.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from q3mega.rewards import score
from q3mega.rewards.math.algebra import Algebra
from q3mega.sandbox import confined

FUNCTION = {"entry_point": "f", "calls": [{"arguments": [3], "result": 9}]}
OUTPUT = {"cases": [{"stdin": "3", "stdout": "9"}]}


def rate(run: Callable[[], object], seconds: float, threads: int = os.cpu_count() or 1) -> float:
    """Calls of `run` a second, from so many threads for so long."""
    end = time.monotonic() + seconds

    def repeat(_: int) -> int:
        done = 0
        while time.monotonic() < end:
            run()
            done += 1
        return done

    begun = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(repeat, range(threads)))
    return done / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    print(f"{os.cpu_count()} cores\n\n| what | a second |\n|---|---|")
    for level in ("namespaces", "landlock"):
        with contextlib.suppress(RuntimeError):  # not on this machine
            run = partial(confined.run, "print(6 * 7)", level=level)
            run()
            print(f"| programs, {level} | {rate(run, seconds):.0f} |")
    for level in confined.LEVELS:
        with contextlib.suppress(RuntimeError), Algebra(level=level).session() as same:
            same("x", "x")  # the worker has started
            judged = rate(partial(same, "2x+2", "2(x+1)"), seconds, threads=1)
            print(f"| comparisons by math-verify, {level} | {judged:.0f} |")
    for name, program, tests in (
        ("by output", "print(int(input()) ** 2)", OUTPUT),
        ("by function", "def f(n):\n    return n ** 2", FUNCTION),
    ):
        judge = partial(score, "code", program, {"tests": tests})
        print(f"| `code` rewards {name} | {rate(judge, seconds):.0f} |")


if __name__ == "__main__":
    main()
