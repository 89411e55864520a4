"""A user's rewards: Python files beside the recipe that register them with `@reward`."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from q3mega.errors import UserError


def load(files: Sequence[str]) -> None:
    """Run the files. Each process that scores calls this. The files are trusted code of the user.

    Raises UserError for a file that does not exist, and with its error for one that breaks.
    """
    for file in files:
        path = Path(file).resolve()
        if path.suffix != ".py" or not path.is_file():
            raise UserError(f"rewards={file}: must be a Python file that is there")
        name = f"q3mega_rewards_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look for their module there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"rewards={file}: {type(error).__name__}: {error}") from error
