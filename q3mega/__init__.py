"""q3mega: the Qwen3 recipe, from raw text to a distilled small model that thinks, on megatron-core."""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_LAZY = {"Recipe": "q3mega.recipe", "run": "q3mega.driver"}

_root = Path(__file__).resolve().parent.parent
if (_root / "csrc").is_dir() and not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(_root))  # a plain checkout: q3mega.kernels is ./kernels


def __getattr__(name: str) -> Any:
    """`Recipe` and `run`, imported when first asked for: `import q3mega` stays light."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'q3mega' has no attribute {name!r}")
