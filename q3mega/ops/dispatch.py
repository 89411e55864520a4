"""Which backend serves which operator, and why not the others.

An operator's front in this package is its definition, the "reference"; faster backends register
here, each with a test of what it can serve. Asking for one that cannot raises with the reason.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

OPERATORS = ("dual_chunk_attention", "linear_logprob", "grpo_loss", "distill_loss")
NAMES = ("reference", "cpu", "triton", "cuda")
Serves = Callable[[Tensor], str | None]
_BACKENDS: dict[tuple[str, str], tuple[Callable[..., Any], Serves]] = {}


def register(
    op: str, backend: str, serves: Serves = lambda x: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function is `backend`'s implementation of `op`.

    serves(the first operand) says why it cannot take it, or None.
    """

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        _BACKENDS[op, backend] = fn, serves
        return fn

    return add


def backends(op: str) -> dict[str, str]:
    """Backend name -> "ok", or why it does not serve `op` here."""
    return {n: "ok" if (op, n) in _BACKENDS else f"no {n} backend of {op} is built" for n in NAMES}


def resolve(op: str, backend: str | None, x: Tensor) -> Callable[..., Any]:
    """The implementation that `backend` names; None picks the best one that can take `x`."""
    for name in reversed(NAMES) if backend is None else (backend,):
        fn, serves = _BACKENDS.get((op, name), (None, None))
        reason = (
            serves(x) if serves else backends(op).get(name, f"choose one of {', '.join(NAMES)}")
        )
        if fn is not None and reason is None:
            return fn
    raise RuntimeError(f"backend={backend!r} of {op} is not available: {reason}")
