"""How a command ends. What the user got wrong is one line on stderr and exit code 2."""

import io
import os
import sys
from collections.abc import Callable

from q3mega.errors import UserError, naming_missing_packages
from q3mega.io import explaining


def run(command: Callable[[], int]) -> int:
    """The command's own exit code: 0, 1 (stage broke, wide gap), 2 (bad input), 75 (stopped, goes
    on); or 2, 130 (interrupted) or 141 (nobody reads what it prints) for what it raises."""
    _prepare_streams()
    try:
        with explaining(), naming_missing_packages(" ".join(["q3mega", *sys.argv[1:2]])):
            try:
                return command()
            finally:
                sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not flushed
        return 141


def _prepare_streams() -> None:
    """What a terminal of another encoding cannot show is no error, and a closed one is none."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
