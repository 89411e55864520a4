"""Which backend serves which operator, and why not the others.

An operator's front in this package is its definition, the "reference"; faster backends register
here as they are built. Asking for one that is not there raises with the reason.
"""

from collections.abc import Callable
from typing import Any

OPERATORS = ("dual_chunk_attention", "linear_logprob", "grpo_loss", "distill_loss")
NAMES = ("reference", "cpu", "triton", "cuda")
_BACKENDS: dict[tuple[str, str], Callable[..., Any]] = {}


def register(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function is `backend`'s implementation of `op`."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        _BACKENDS[op, backend] = fn
        return fn

    return add


def backends(op: str) -> dict[str, str]:
    """Backend name -> "ok", or why it does not serve `op` here."""
    return {n: "ok" if (op, n) in _BACKENDS else f"no {n} backend of {op} is built" for n in NAMES}


def resolve(op: str, backend: str | None) -> Callable[..., Any]:
    """The implementation that `backend` names; None picks the best one available."""
    if backend is None:
        backend = next(n for n in reversed(NAMES) if (op, n) in _BACKENDS)
    if (op, backend) not in _BACKENDS:
        reason = backends(op).get(backend, f"choose one of {', '.join(NAMES)}")
        raise RuntimeError(f"backend={backend!r} of {op} is not available: {reason}")
    return _BACKENDS[op, backend]
