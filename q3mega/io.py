"""Files: JSON that every reader takes, whole files or none, one process a folder.

A line of JSON lines ends at a newline alone: strings may hold U+2028, U+0085 and the other
characters at which `str.splitlines` cuts. A file may begin with a byte order mark.
"""

import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from q3mega.errors import UserError


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line without its end) of each line that is not blank. Raises OSError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line.strip(b" \t\r\n")


def whole_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines that we write ourselves: a line that a kill cut in two
    is left out, and a file that is not there has none."""
    if not path.exists():
        return []
    records = []
    for _, line in json_lines(path):
        try:
            record = json.loads(line.decode("utf-8", errors="replace"))
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON in UTF-8: a number that is not finite becomes null, half a surrogate pair U+FFFD.

    numpy's and torch's scalars are the numbers they hold. Raises TypeError for what is no JSON.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if not isinstance(value, str | bool | int | float | None) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """`to_json` as a whole file or none."""
    with atomic_write(path) as partial:
        partial.write_text(to_json(value, indent) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a file of ours holds. Raises OSError and ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file to write to, which becomes `path` when the block ends well, and is gone when not.

    The process's number is in its name: a worker that outlives a killed run disturbs no other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# What of a user's machine may fail a write or a read, as against a fault of ours.
_OF_THE_USER = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE,
}  # fmt: skip


@contextmanager
def explaining() -> Iterator[None]:
    """Raise UserError for a file or disk of the user's that cannot be read or written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_USER:
            raise
        raise UserError(_explained(error)) from error


def _explained(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some disk space" if full else "choose what can be read and written"
    of = f"{error.filename}: " if error.filename else ""
    return f"{of}{error.strerror}; {remedy}"


# What file systems without locks answer: some network and user-space ones.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO, errno.EINVAL}
_RETRY_SECONDS = 0.2


@contextmanager
def exclusive_lock(path: Path, in_use: str, wait: float = 0.0) -> Iterator[None]:
    """Hold `path`, a file that is made; the system lets go of it however the process ends.

    `in_use` says what to tell where another process holds it after `wait` seconds; who that is
    stands for {holder}. Where files cannot be locked, a file `<path>.holder` is made and removed,
    and one that a dead process of this machine has left is taken over. Raises UserError, OSError.
    """
    deadline = time.monotonic() + wait
    with path.open("a+", encoding="utf-8") as file:
        try:
            while not _locked(file):
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise UserError(in_use.replace("{holder}", _name(file.read())))
                time.sleep(_RETRY_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held: Path | None = path.with_name(f"{path.name}.holder")
        else:
            held = None
            file.truncate(0)
            print(_me(), file=file, flush=True)
        if held:
            _take(held, in_use, deadline)
        try:
            yield
        finally:
            if held:
                held.unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _me() -> str:
    return " ".join([str(os.getpid()), socket.gethostname(), os.environ.get("SLURM_JOB_ID", "")])


def _name(holder: str) -> str:
    """A holder's number, with its machine where that is another."""
    pid, host, job = [*holder.split(), "", "", ""][:3]
    of_job = f", SLURM job {job}" if job else ""
    return pid if host in ("", socket.gethostname()) else f"{pid} on {host}{of_job}"


def _take(held: Path, in_use: str, deadline: float) -> None:
    while True:
        with suppress(FileExistsError):
            with held.open("x", encoding="utf-8") as file:
                file.write(_me())
            return
        with suppress(FileNotFoundError):
            holder = held.read_text(encoding="utf-8")
            if _is_gone(holder):
                held.rename(held.with_name(f"{held.name}.{os.getpid()}"))  # of two, one succeeds
                held.with_name(f"{held.name}.{os.getpid()}").unlink()
            elif time.monotonic() >= deadline:
                message = in_use.replace("{holder}", _name(holder))
                raise UserError(f"{message}; if that process is no more, remove {held}")
            else:
                time.sleep(_RETRY_SECONDS)


def _is_gone(holder: str) -> bool:
    """Is it a process of this machine that has ended, or of this very job before it was queued
    again?"""
    pid, host, job = [*holder.split(), "", "", ""][:3]
    if not pid.isdigit():  # just being written
        return False
    if host != socket.gethostname():
        return bool(job) and job == os.environ.get("SLURM_JOB_ID")
    return int(pid) == os.getpid() or not psutil.pid_exists(int(pid))
