"""math-verify in a process of its own, which the parent starts, times and kills.

sympy's parsers may evaluate what they read, can run for hours and fill the memory, so a model's
text never reaches them in the process that trains, and the one that they are in is confined as the
sandbox's programs are. One line of JSON asks, one answers.
"""

import atexit
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from q3mega.rewards import sandbox

SECONDS = 5.0  # for one answer, all of its pieces; the worker's start comes on top
START_SECONDS = 60.0  # it imports sympy, from a slow disk perhaps
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
COMMAND = (sandbox.interpreter(), *_FLAGS, str(_MAIN), *_PACKAGES)
# It writes nothing and sees to its own CPU time (algebra_worker.py); the other limits never cut.
_LIMITS = sandbox.Limits(cpu=10**9, wall=1e9, memory=2 << 30, output=0, scratch=1 << 12)

Same = Callable[[str, str], bool]


class Algebra:
    """One worker, started when first needed. Any thread may ask; a forked child gets its own.

    level: one of sandbox.LEVELS, by default `sandbox.confinement()`.
    """

    def __init__(
        self,
        command: Sequence[str] = COMMAND,
        seconds: float = SECONDS,
        level: str | None = None,
    ) -> None:
        self._command, self._seconds, self._level = command, seconds, level
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    @property
    def pid(self) -> int | None:
        """The process id of the worker's launcher, which it ends with; None where none runs."""
        return self._worker.pid if self._worker else None

    @contextmanager
    def session(self) -> Iterator[Same]:
        """`same(reference, given)` of two pieces of LaTeX; all calls of a session share the limit,
        past which everything is unequal. Waiting for other threads does not count.

        Raises RuntimeError when the worker cannot start, UserError where nothing confines it
        (`sandbox.confinement`).
        """
        with self._lock:
            left = self._seconds

            def same(reference: str, given: str) -> bool:
                nonlocal left
                line = json.dumps([reference, given]).encode() + b"\n"
                for _ in range(2):  # a worker that somebody killed is not the text's fault
                    worker = self._started()
                    began = time.monotonic()
                    reply = _ask(worker, line, left)
                    left -= time.monotonic() - began
                    if reply is not None and reply.endswith(b"\n"):
                        return bool(json.loads(reply))
                    self.close()
                    if left <= 0:
                        return False
                return False

            yield same

    def close(self) -> None:
        """Ends the worker; the next question starts another."""
        if self._worker:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker and self._worker.poll() is None:
            return self._worker
        self.close()
        read = (str(_MAIN), *_PACKAGES)
        launcher = sandbox.launcher(self._level or sandbox.confinement(), _LIMITS, read)
        pipe = subprocess.PIPE
        try:
            self._worker = subprocess.Popen(
                [*launcher, "--", *self._command],
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env={},
                bufsize=0,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        except OSError as error:
            raise RuntimeError(f"the math-verify worker cannot start: {error}") from error
        if _ask(self._worker, b"", START_SECONDS) != b"ready\n":
            self._worker.kill()
            said = self._worker.communicate()[1].decode(errors="replace").strip().splitlines()
            self._worker = None
            reason = said[-1] if said else "no reply"
            raise RuntimeError(f"the math-verify worker cannot start: {reason}")
        return self._worker

    def _forget(self) -> None:
        """In a forked child: the worker and the lock are the parent's."""
        self._lock = threading.Lock()
        if self._worker:
            for pipe in (self._worker.stdin, self._worker.stdout, self._worker.stderr):
                assert pipe is not None
                pipe.close()  # else the worker would outlive the parent as long as this child lives
            self._worker.returncode = 0  # not ours to wait for
            self._worker = None


def _ask(worker: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes | None:
    """The worker's next line; cut short when it died, None when it took longer."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(line)  # the worker is idle and reads it: this does not block
    except BrokenPipeError:
        return b""
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    until, reply = time.monotonic() + seconds, b""
    while not reply.endswith(b"\n"):
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            return None
        if not (more := worker.stdout.read(4096)):
            break
        reply += more
    return reply


ALGEBRA = Algebra()
