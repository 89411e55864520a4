"""The Qwen3 recipe on megatron-core, from raw text to a distilled small model that thinks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from q3mega.errors import naming_missing_packages

if TYPE_CHECKING:
    from q3mega import ops
    from q3mega.config.recipe import Recipe
    from q3mega.launch.driver import run

__all__ = ["Recipe", "ops", "run"]
__version__ = "0.1.0"

_MODULES = {"Recipe": "q3mega.config.recipe", "run": "q3mega.launch.driver"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: `import q3mega` stays light."""
    if name == "ops":
        return import_module("q3mega.ops")
    if name in _MODULES:
        with naming_missing_packages(f"q3mega.{name}"):
            return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'q3mega' has no attribute {name!r}")
