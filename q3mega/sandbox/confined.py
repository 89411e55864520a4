"""Model-written Python in a process that can compute and print, and nothing else.

`run(program)` starts it under the launcher `confine` (csrc/sandbox/confine.cpp). The program may
read the standard library, and write to a scratch folder where there is one. It has no network, no
other processes, and limits on CPU time, wall time, memory and output. Where the machine can
confine nothing, `run` refuses, unless Q3MEGA_UNCONFINED=1 is set.
"""

import functools
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from q3mega.errors import UserError

CONFINE = Path(__file__).parents[1] / "confine"
UNCONFINED = "Q3MEGA_UNCONFINED"
LEVELS = {
    "namespaces": "user namespaces, seccomp and limits",
    "landlock": "Landlock, seccomp and limits",
    "none": f"seccomp and limits alone, since {UNCONFINED}=1",
}
# Descriptor 3 holds the program, so that no file of it has to lie anywhere. The program finds what
# an ordinary python3 has: exit and quit, and the standard streams by their names in /dev, which has
# no other entries here. Its threads have the usual stack, whatever that of the process is.
_BOOTSTRAP = """
import _sitebuiltins, _thread, builtins, io, posix, sys
with open(3, encoding="utf-8") as file:
    source = file.read()
def named(file, *given, open=open, dup=posix.dup, **more):
    number = STREAMS.get(str(file))
    return open(file if number is None else dup(number), *given, **more)
STREAMS = {f"/dev/{name}": n for n, name in enumerate(("stdin", "stdout", "stderr"))}
STREAMS |= {f"{folder}/{n}": n for n in range(3) for folder in ("/dev/fd", "/proc/self/fd")}
builtins.open = io.open = named
builtins.exit, builtins.quit = (_sitebuiltins.Quitter(n, "Ctrl-D") for n in ("exit", "quit"))
_thread.stack_size(8 << 20)
sys.argv = ["main.py"]
main = sys.modules["__main__"] = type(sys)("__main__")
main.__file__ = "main.py"
exec(compile(source, "main.py", "exec"), main.__dict__)
"""
# UTF-8, and integers as long as contests print them.
_OPTIONS = "-X", "utf8", "-X", "int_max_str_digits=0"
Status = Literal["ok", "error", "time", "memory", "output", "signal"]


@dataclass(frozen=True)
class Limits:
    """Limits of one process.

    cpu (s): CPU time.
    wall (s): wall time.
    memory (bytes): address space. A stack larger than the default comes on top.
    output (bytes): of stdout, of stderr and of any other file.
    scratch (bytes): of all files together, on the level "namespaces".
    stack (bytes): of the main thread, and of another thread that asks for it.
    """

    cpu: int = 5
    wall: float = 10.0
    memory: int = 512 << 20
    output: int = 1 << 20
    scratch: int = 16 << 20
    stack: int = 8 << 20


# What a row may ask for, from ... to.
_RANGES: dict[str, tuple[float, float]] = {
    "cpu": (1, 3600),
    "wall": (0.1, 7200),
    "memory": (32 << 20, 64 << 30),
    "output": (1, 1 << 30),
    "scratch": (1 << 12, 16 << 30),
    "stack": (1 << 20, 4 << 30),
}


def limits_of(fields: Any) -> Limits:
    """Limits from a row's fields. A `wall` that is not given is at least twice `cpu`.

    Raises UserError for an unknown field, and for a value that is no number in its range.
    """
    if not isinstance(fields, Mapping):
        raise UserError(f"limits={fields!r:.80} must be an object of {', '.join(_RANGES)}")
    for name, value in fields.items():
        if name not in _RANGES:
            raise UserError(f"limits.{name} is unknown: use some of {', '.join(_RANGES)}")
        least, most = _RANGES[name]
        kinds = (int, float) if name == "wall" else (int,)
        if type(value) not in kinds or not least <= value <= most:
            kind = "number" if name == "wall" else "whole number"
            raise UserError(f"limits.{name}={value!r:.80} must be a {kind} from {least} to {most}")
    wall = max(Limits.wall, 2.0 * fields.get("cpu", 0))
    return Limits(**{"wall": wall, **fields})


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    status: "ok" is exit code 0.
    reason: one line on what happened.
    stdout, stderr: what it printed, bytes that are no UTF-8 replaced.
    memory (bytes): peak.
    cpu (s), seconds (s): CPU time and wall time, the launcher's included.
    """

    status: Status
    reason: str
    stdout: str
    stderr: str
    memory: int = 0
    cpu: float = 0.0
    seconds: float = 0.0


def run(
    program: str, stdin: str = "", limits: Limits = Limits(), level: str | None = None
) -> Outcome:
    """Run Python source text with `stdin`; level: one of LEVELS, by default `confinement()`.

    Raises UserError where nothing confines it, RuntimeError when the launcher fails.
    """
    with started(program, limits, stdin, level=level) as process:
        return process.wait()


@dataclass
class Started:
    """A running program. Its report and its output are read when it has ended."""

    process: "subprocess.Popen[bytes]"
    limits: Limits
    report: BinaryIO
    stderr: BinaryIO
    stdout: BinaryIO | None
    started_at: float

    def wait(self) -> Outcome:
        """Wait for the program's end. The launcher holds it to its limits."""
        code = self.process.wait()
        printed = _read(self.stdout) if self.stdout else ""
        complaint = _read(self.stderr)
        words = _read(self.report).strip().split(maxsplit=1)
        seconds = time.monotonic() - self.started_at
        if not words and code < 0:  # the launcher's own end is its program's, not the caller's
            late = code == -signal.SIGALRM
            name = signal.Signals(-code).name
            reason = f"over {self.limits.wall:g} s of wall time" if late else f"ended by {name}"
            status: Status = "time" if late else "signal"
            return Outcome(status, reason, printed, complaint, seconds=seconds)
        if not words or words[0] == "refused":
            raise RuntimeError(f"the sandbox did not start: {' '.join(words[1:]) or complaint}")
        value, kib, ms = map(int, words[1].split())
        status, reason = _judge(words[0], value, ms / 1000, self.limits, complaint)
        return Outcome(status, reason, printed, complaint, kib << 10, ms / 1000, seconds)


@contextmanager
def started(
    program: str,
    limits: Limits = Limits(),
    stdin: str | int = "",
    stdout: int | None = None,
    level: str | None = None,
) -> Iterator[Started]:
    """`run` in two halves. stdin, stdout: descriptors, instead of text and of Outcome.stdout."""
    level = level or confinement()
    with ExitStack() as files:
        source = files.enter_context(_memory_file(program))
        report, stderr = (files.enter_context(_memory_file()) for _ in range(2))
        given = files.enter_context(_memory_file(stdin)) if isinstance(stdin, str) else stdin
        printed = files.enter_context(_memory_file()) if stdout is None else None
        given_files = ["--program", str(source.fileno()), "--report", str(report.fileno())]
        command = [interpreter(), "-I", "-S", "-B", *_OPTIONS, "-c", _BOOTSTRAP]
        started_at = time.monotonic()
        process = subprocess.Popen(
            [*launcher(level, limits), *given_files, "--", *command],
            stdin=given,
            stdout=printed or stdout,
            stderr=stderr,
            pass_fds=(source.fileno(), report.fileno()),
            env={},
            cwd="/",
        )
        try:
            yield Started(process, limits, report, stderr, printed, started_at)
        finally:
            process.kill()  # the keeper, and with it the program, end with their launcher
            process.wait()


def launcher(level: str, limits: Limits, read: Iterable[str] = ()) -> list[str]:
    """The words before `--` and a command. read: paths beside the interpreter's."""
    numbers = {
        "memory": limits.memory + max(0, limits.stack - Limits.stack),
        "stack": limits.stack,
        "cpu": limits.cpu,
        "wall": limits.wall,
        "file": limits.output,
        "scratch": limits.scratch,
    }
    options = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    options += [word for path in (*_readable(), *read) for word in ("--read", path)]
    return [str(CONFINE), "--level", level, *options]


@functools.cache
def confinement() -> str:
    """The strictest level that works here.

    Raises UserError with what stands in each one's way, unless Q3MEGA_UNCONFINED=1 is set.
    """
    if not CONFINE.exists():
        raise UserError(
            f"{CONFINE} is missing, without which no program runs: pip install . on Linux"
        )
    problems = []
    for level in LEVELS:
        if level == "none" and os.environ.get(UNCONFINED) != "1":
            break
        try:
            outcome = run("print(6 * 7)", level=level)
        except RuntimeError as error:
            problems.append(f"{level}: {error}")
            continue
        if outcome.stdout == "42\n":
            return level
        problems.append(f"{level}: {outcome.reason}")
    raise UserError(
        "nothing here confines what a model writes "
        f"({'; '.join(problems)}): allow user namespaces or Landlock, or set "
        f"{UNCONFINED}=1 to run it all the same, at your own risk"
    )


def _judge(how: str, value: int, cpu: float, limits: Limits, complaint: str) -> tuple[Status, str]:
    """Status and reason of a program that ended by itself or by a limit."""
    last = complaint.strip().rsplit("\n", 1)[-1][:200]
    if how == "signal":
        if value == signal.SIGXCPU or (value == signal.SIGKILL and cpu >= limits.cpu):
            return "time", f"over {limits.cpu} s of CPU time"
        if value == signal.SIGXFSZ:
            return "output", f"over {limits.output} bytes in a file"
        return "signal", f"ended by {signal.Signals(value).name}"
    if value == 0:
        return "ok", "exit 0"
    if last.startswith("MemoryError"):
        return "memory", f"over {limits.memory >> 20} MiB"
    if "[Errno 27]" in complaint:  # EFBIG
        return "output", f"over {limits.output} bytes in a file"
    return "error", f"exit {value}: {last}" if last else f"exit {value}"


@contextmanager
def _memory_file(text: str = "") -> Iterator[BinaryIO]:
    """A file without a name. Its position is at the start. A process that inherits it shares it."""
    with os.fdopen(os.memfd_create("q3mega"), "w+b", buffering=0) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.seek(0)
        yield file


def _read(file: BinaryIO) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode("utf-8", "replace")


@functools.cache
def interpreter() -> str:
    """This Python, out of its virtual environment."""
    return os.path.realpath(sys.executable)


@functools.cache
def _readable() -> tuple[str, ...]:
    """The interpreter, its standard library, and the C library with its loader."""
    base = Path(sys.base_prefix)
    interpreter_paths = (base / "lib", sysconfig.get_paths()["stdlib"], interpreter())
    system_paths = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
    return tuple(dict.fromkeys(map(str, (*interpreter_paths, *system_paths))))
