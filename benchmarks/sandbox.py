"""Runs a second of model-written programs, by confinement and by kind of test.

    python benchmarks/sandbox.py [--seconds 5]

Each row keeps as many programs going as the machine has cores.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from q3mega.rewards import sandbox, score

FUNCTION = {"entry_point": "f", "calls": [{"arguments": [3], "result": 9}]}
OUTPUT = {"cases": [{"stdin": "3", "stdout": "9"}]}


def rate(work: Callable[[], object], seconds: float) -> float:
    """Calls of `work` a second, on all cores for so long."""
    end = time.monotonic() + seconds

    def repeat(_: int) -> int:
        done = 0
        while time.monotonic() < end:
            work()
            done += 1
        return done

    begun = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = sum(pool.map(repeat, range(os.cpu_count() or 1)))
    return done / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    print(f"{os.cpu_count()} cores\n\n| what | a second |\n|---|---|")
    for level in ("namespaces", "landlock"):
        with contextlib.suppress(RuntimeError):  # not on this machine
            run = partial(sandbox.run, "print(6 * 7)", level=level)
            run()
            print(f"| programs, {level} | {rate(run, seconds):.0f} |")
    for name, program, tests in (
        ("by output", "print(int(input()) ** 2)", OUTPUT),
        ("by function", "def f(n):\n    return n ** 2", FUNCTION),
    ):
        judge = partial(score, "code", program, {"tests": tests})
        print(f"| `code` rewards {name} | {rate(judge, seconds):.0f} |")


if __name__ == "__main__":
    main()
