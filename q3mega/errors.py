"""The one error a user is meant to see: a sentence, no traceback, exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_STOPPED = 75  # of a stage that was asked to stop and goes on when it is started again


class UserError(ValueError):
    """Bad input. The message names the field, the value, and the remedy, in one line."""


class JudgeFailed(UserError):
    """A judge model gave no usable verdict, which is never a score, and never silent."""


class MissingPackage(UserError, ImportError):
    """A package of an extra that is not installed."""


# Import name -> what pip calls it, of the packages that the extras bring (pyproject.toml).
_OF_CURATE = {
    "numpy": "numpy", "pydantic": "pydantic", "yaml": "pyyaml", "rich": "rich", "psutil": "psutil",
    "packaging": "packaging", "tokenizers": "tokenizers", "jinja2": "jinja2", "rensa": "rensa",
    "py3langid": "py3langid", "pyarrow": "pyarrow", "backports": "backports.zstd",
    "megatron": "megatron-core",
}  # fmt: skip
_OF_RECIPE = _OF_CURATE | {
    "transformers": "transformers", "safetensors": "safetensors", "matplotlib": "matplotlib",
    "emerging_optimizers": "emerging-optimizers", "absl": "absl-py", "sympy": "sympy",
    "reasoning_gym": "reasoning-gym", "math_verify": "math-verify", "jsonschema": "jsonschema",
    "django": "Django", "openai": "openai", "httpx2": "httpx2",
}  # fmt: skip


@contextmanager
def naming_missing_packages(user: str) -> Iterator[None]:
    """Turns a missing package of an extra into a MissingPackage that names both.

    user: what needs the package, "q3mega run" or a module.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in _OF_RECIPE:
            raise
        of_curate = user.endswith("curate") and module in _OF_CURATE
        remedy = f"pip install 'q3mega[{'curate' if of_curate else 'recipe'}]'"
        if module in ("megatron", "emerging_optimizers") and sys.version_info < (3, 12):
            remedy = (
                "pip install --no-deps --ignore-requires-python megatron-core==0.19.2 "
                "emerging-optimizers==0.3.0"
            )
        raise MissingPackage(f"{user} needs the package {_OF_RECIPE[module]}: {remedy}") from error


@dataclass(frozen=True)
class NoReply:
    """Stands where a model's text, or an opinion read from one, could not be had: that costs its
    sample. rule: what dropped samples are counted by. detail: what happened, and the remedy.
    again: another temperature may give one."""

    rule: str
    detail: str
    again: bool = False


class Stopped(BaseException):
    """A stage was asked to stop. No failure, so that nothing which catches those swallows it."""
