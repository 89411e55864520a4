"""math-verify in a process of its own, which the parent starts, times and kills.

sympy's parsers may evaluate what they read, can run for hours and fill the memory. So a model's
text never reaches them in the training process. Their own process is confined as the sandbox's
programs are. A line of JSON asks and a line of JSON answers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from q3mega.sandbox import Limits, Worker, WorkerProgram, confined

TIMEOUT_S = 5.0  # for one answer, all of its pieces; the worker's start comes on top
_WORKER_PATH = str(Path(__file__).with_name("algebra_worker.py"))
_PACKAGES = "math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath"
# The worker is run by path, so that nothing of this package is imported. -P: this folder is not on
# its path. -s and -S: nor are the user's packages and the environment's, but for those named.
_FLAGS = "-P", "-s", "-S", "-B", "-X", "utf8"
# It writes nothing and sees to its own CPU time (algebra_worker.py). The other limits never cut.
_LIMITS = Limits(cpu=10**9, wall=1e9, memory=2 << 30, output=0, scratch=1 << 12)

Same = Callable[[str, str], bool]


@cache
def math_verify() -> WorkerProgram:
    """This Python with the worker's file and the folders of its packages, which it reads."""
    specs = [find_spec(name) for name in _PACKAGES]
    origins = [spec.origin for spec in specs if spec and spec.origin]
    folders = tuple(dict.fromkeys(str(Path(origin).parents[1]) for origin in origins))
    command = (confined.interpreter(), *_FLAGS, _WORKER_PATH, *folders)
    return WorkerProgram(command, (_WORKER_PATH, *folders))


class Algebra(Worker):
    """The worker that compares. program, seconds, level: as of `Worker`."""

    def __init__(
        self,
        program: Callable[[], WorkerProgram] = math_verify,
        seconds: float = TIMEOUT_S,
        level: str | None = None,
    ) -> None:
        super().__init__("math-verify", program, _LIMITS, seconds, level)

    @contextmanager
    def session(self) -> Iterator[Same]:
        """`same(reference, given)` of two pieces of LaTeX.

        All calls of a session share the limit, past which everything is unequal. Raises what
        `asking` does.
        """
        with self.asking() as ask:
            yield lambda reference, given: ask([reference, given]) is True


ALGEBRA = Algebra()
