"""Which backend serves which operator, and why not the others.

An operator's front in this package is its definition, the "reference". Faster backends register
here, each with a test of what it can serve. A call that names one which cannot serve raises
RuntimeError with the reason.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

OPERATORS = ("dual_chunk_attention", "linear_logprob", "grpo_loss", "distill_loss")
NAMES = ("reference", "cpu", "triton", "cuda")
# Order of choice by device. The CUDA kernels have not run on a GPU yet, so only a call that names
# them gets them.
PREFERRED = {"cuda": ("triton", "reference"), "cpu": ("cpu", "reference")}
Serves = Callable[[Tensor], str | None]
_BACKENDS: dict[tuple[str, str], tuple[Callable[..., Any], Serves]] = {}


def register(
    op: str, backend: str, serves: Serves = lambda x: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function is `backend`'s implementation of `op`.

    serves(the first operand): why the backend cannot take it, or None.
    """

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        _BACKENDS[op, backend] = partial(_without_autocast, fn), serves
        return fn

    return add


def own_precision(x: Tensor) -> torch.autocast:
    """A context without torch.autocast: every operator chooses its own fp32 sums, and a product in
    another precision would not fit its buffers."""
    return torch.autocast(x.device.type, enabled=False)


def backends(op: str) -> dict[str, str]:
    """Backend name -> "default", "ok" (when named), or why it cannot serve Qwen3's `op` on this
    machine's best device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty(0, 1, 128, device=device, dtype=torch.bfloat16)
    states = {name: _reason(op, name, x) or "ok" for name in NAMES}
    return states | {next(name for name in PREFERRED[device] if states[name] == "ok"): "default"}


def _reason(op: str, name: str, x: Tensor) -> str | None:
    """Why the backend cannot take `x`, or None."""
    if name not in NAMES:
        return f"choose one of {', '.join(NAMES)}"
    _, serves = _BACKENDS.get((op, name), (None, lambda _: f"no {name} backend of {op} is built"))
    return serves(x)


def resolve(op: str, backend: str | None, x: Tensor) -> Callable[..., Any]:
    """The implementation that `backend` names; None picks the preferred one that can take `x`.

    The environment variable Q3MEGA_BACKEND stands for a name wherever none is given.
    """
    reason, backend = None, backend or os.environ.get("Q3MEGA_BACKEND")
    for name in PREFERRED["cuda" if x.is_cuda else "cpu"] if backend is None else (backend,):
        reason = _reason(op, name, x)
        if reason is None:
            return _BACKENDS[op, name][0]
    raise RuntimeError(f"backend={backend!r} of {op} is not available: {reason}")


def _without_autocast(fn: Callable[..., Any], x: Tensor, *operands: Any, **options: Any) -> Any:
    with own_precision(x):
        return fn(x, *operands, **options)
