"""math-verify in a process of its own, which the parent starts, times and kills.

sympy's parsers may evaluate what they read, can run for hours and fill the memory, so a model's
text never reaches them in the process that trains. One line of JSON asks, one answers.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS = 5.0  # for one answer, all of its pieces; the worker's start comes on top
START_SECONDS = 60.0  # it imports sympy, from a slow disk perhaps
_MAIN = Path(__file__).with_name("algebra_worker.py")
# By path, so that nothing of this package is imported. -P: this folder is not on its path, -s: nor
# is the user's.
COMMAND = (sys.executable, "-P", "-s", str(_MAIN))
# All the worker sees of the environment. Verdicts do not depend on the order of hashes; the path of
# shared libraries is what some Pythons need to start.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
_INHERITED = ("LD_LIBRARY_PATH",)

Same = Callable[[str, str], bool]


class Algebra:
    """One worker, started when first needed. Any thread may ask; a forked child gets its own."""

    def __init__(self, command: Sequence[str] = COMMAND, seconds: float = SECONDS) -> None:
        self._command, self._seconds = command, seconds
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    @property
    def pid(self) -> int | None:
        """The worker's process id, None where none runs."""
        return self._worker.pid if self._worker else None

    @contextmanager
    def session(self) -> Iterator[Same]:
        """`same(reference, given)` of two pieces of LaTeX; all calls of a session share the limit,
        past which everything is unequal. Waiting for other threads does not count.

        Raises RuntimeError when the worker cannot start.
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
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        pipe = subprocess.PIPE
        try:
            self._worker = subprocess.Popen(
                self._command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=inherited | _ENVIRONMENT,
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
