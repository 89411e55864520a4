"""What makes a run resumable: one run a folder, hashes of what was read."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from q3mega.io import exclusive_lock


def sha256(path: Path) -> str:
    """The hash of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """The only run in `out`, which is made; what a killed one left half-written is removed."""
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out / ".lock", f"--out {out}: another run is at work there"):
        for partial in out.rglob("*.partial"):
            partial.unlink(missing_ok=True)
        yield
