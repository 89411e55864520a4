"""What makes a run resumable: whole files or none, one run a folder, hashes of what was read."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from q3mega.errors import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
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


def write_json(path: Path, value: Any) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """The only run in `out`, which is made; what a killed one left half-written is removed."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:  # the system gives it back however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is at work there") from None
        for partial in out.rglob("*.partial"):
            partial.unlink(missing_ok=True)
        yield
