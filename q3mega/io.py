"""Files: JSON that every reader takes, whole files or none, one process a folder.

A line of JSON lines ends at a newline alone: strings may hold U+2028, U+0085 and the other
characters at which `str.splitlines` cuts. A file may begin with a byte order mark.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def exclusive_lock(path: Path, in_use: str) -> Iterator[None]:
    """Hold `path`, a file that is made; the system lets go of it however the process ends.

    `in_use` says what to tell where another process holds it, whose number is put for {holder}.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(in_use.format(holder=file.read().strip())) from None
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield
