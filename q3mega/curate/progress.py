"""How far a curation is: a bar on a terminal, a line now and then anywhere else."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_SECONDS = 15  # between two lines
_T = TypeVar("_T")


def followed(what: str, items: Iterable[_T], total: int) -> Iterator[_T]:
    """The items as they come, shown on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, what, total, console=console)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done == total or time.monotonic() - last > _SECONDS:
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
            last = time.monotonic()
