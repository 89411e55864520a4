"""A confined process that answers questions. Its parent starts, times and kills it.

It holds code that may run for hours inside one call, fill the memory or evaluate what it reads, so
that the training process never does. A line of JSON asks and a line of JSON answers. The worker's
first line is "ready".
"""

import atexit
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from q3mega.sandbox import confined

START_TIMEOUT_S = 60.0  # it imports its packages, from a slow disk perhaps

Ask = Callable[[Any], Any]


@dataclass(frozen=True)
class WorkerProgram:
    """command: the words that start it. read: paths it reads besides the standard library."""

    command: tuple[str, ...]
    read: tuple[str, ...]


class Worker:
    """One process, started when first needed. Any thread may ask. A forked child gets its own.

    name: what errors call it.
    program: gives what to run. It is called at each start.
    limits: of the process.
    seconds: for all questions of one `asking`.
    level: one of confined.LEVELS, by default `confinement()`.
    """

    def __init__(
        self,
        name: str,
        program: Callable[[], WorkerProgram],
        limits: confined.Limits,
        seconds: float,
        level: str | None = None,
    ) -> None:
        self._name, self._program = name, program
        self._limits, self._seconds, self._level = limits, seconds, level
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._has_hooks = False

    @property
    def pid(self) -> int | None:
        """The process id of the worker's launcher, which it ends with; None where none runs."""
        return self._process.pid if self._process else None

    @contextmanager
    def asking(self) -> Iterator[Ask]:
        """`ask(question)`: the reply, None where the time is over or the question ends the worker
        twice; all questions share the limit. Waiting for other threads does not count.

        Raises RuntimeError when the worker cannot start, UserError where nothing confines it
        (`confined.confinement`).
        """
        self._add_hooks()  # before the lock is taken: a forked child needs a free one
        with self._lock:
            left = self._seconds

            def ask(question: Any) -> Any:
                nonlocal left
                line = json.dumps(question).encode() + b"\n"
                for _ in range(2):  # a worker that somebody killed is not the question's fault
                    process = self._started()
                    began = time.monotonic()
                    reply = _reply(process, line, left)
                    left -= time.monotonic() - began
                    if reply is not None and reply.endswith(b"\n"):
                        return json.loads(reply)
                    self.close()
                    if left <= 0:
                        return None
                return None

            yield ask

    def close(self) -> None:
        """Ends the worker; the next question starts another."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _add_hooks(self) -> None:
        """Once, so that a process that never asks keeps no hooks. A second time does no harm."""
        if not self._has_hooks:
            atexit.register(self.close)
            os.register_at_fork(after_in_child=self._forget)
            self._has_hooks = True

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process and self._process.poll() is None:
            return self._process
        self.close()
        level = self._level or confined.confinement()
        program = self._program()
        launcher = confined.launcher(level, self._limits, program.read)
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                [*launcher, "--", *program.command],
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env={},
                bufsize=0,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        except OSError as error:
            raise RuntimeError(f"the {self._name} worker cannot start: {error}") from error
        if _reply(self._process, b"", START_TIMEOUT_S) != b"ready\n":
            self._process.kill()
            complaint = self._process.communicate()[1].decode(errors="replace").strip()
            self._process = None
            reason = complaint.rsplit("\n", 1)[-1] or "no reply"
            raise RuntimeError(f"the {self._name} worker cannot start: {reason}")
        return self._process

    def _forget(self) -> None:
        """In a forked child: the worker and the lock are the parent's."""
        self._lock = threading.Lock()
        if self._process:
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                assert pipe is not None
                pipe.close()  # else the worker would outlive the parent as long as this child lives
            self._process.returncode = 0  # not ours to wait for
            self._process = None


def _reply(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes | None:
    """The worker's next line; cut short when it died, None when it took longer."""
    assert process.stdin is not None and process.stdout is not None
    try:
        while line:  # the worker is idle and reads it: this does not block
            line = line[process.stdin.write(line) :]
    except BrokenPipeError:
        return b""
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    until, reply = time.monotonic() + seconds, b""
    while not reply.endswith(b"\n"):
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            return None
        if not (more := process.stdout.read(4096)):
            break
        reply += more
    return reply
