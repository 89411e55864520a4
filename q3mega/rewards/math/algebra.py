"""math-verify in a process of its own, which the parent starts, times and kills.

sympy's parsers may evaluate what they read, can run for hours and fill the memory, so a model's
text never reaches them in the process that trains, and the one that they are in is confined as the
sandbox's programs are. One line of JSON asks, one answers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from q3mega.sandbox import confined
from q3mega.sandbox.worker import Worker

SECONDS = 5.0  # for one answer, all of its pieces; the worker's start comes on top
_MAIN = Path(__file__).with_name("algebra_worker.py")
# It reads these folders besides the standard library.
_PACKAGES = tuple(
    dict.fromkeys(
        str(Path(spec.origin).parents[1])
        for name in ("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath")
        if (spec := find_spec(name)) and spec.origin
    )
)
# By path, so that nothing of this package is imported. -P: this folder is not on its path, -s and
# -S: nor are the user's packages and the environment's, but for those named.
_FLAGS = "-P", "-s", "-S", "-B", "-X", "utf8"
COMMAND = (confined.interpreter(), *_FLAGS, str(_MAIN), *_PACKAGES)
# It writes nothing and sees to its own CPU time (algebra_worker.py); the other limits never cut.
_LIMITS = confined.Limits(cpu=10**9, wall=1e9, memory=2 << 30, output=0, scratch=1 << 12)

Same = Callable[[str, str], bool]


class Algebra(Worker):
    """The worker that compares. level: as of `Worker`."""

    def __init__(
        self,
        command: Sequence[str] = COMMAND,
        seconds: float = SECONDS,
        level: str | None = None,
    ) -> None:
        read = (str(_MAIN), *_PACKAGES)
        super().__init__("math-verify", command, read, _LIMITS, seconds, level)

    @contextmanager
    def session(self) -> Iterator[Same]:
        """`same(reference, given)` of two pieces of LaTeX; all calls of a session share the limit,
        past which everything is unequal. Raises what `asking` does.
        """
        with self.asking() as ask:
            yield lambda reference, given: ask([reference, given]) is True


ALGEBRA = Algebra()
