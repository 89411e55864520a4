"""The Triton kernels of kernels/: on a GPU, or on a CPU in Triton's interpreter."""

import os

import torch
from torch import Tensor

from q3mega.kernels import dual_chunk_attention
from q3mega.kernels.distill_loss import (
    divergence_gradient,
    divergence_sums,
    picked_d_hidden,
    picked_d_weight,
    picked_logits,
)
from q3mega.kernels.linear_logprob import row_gradient, row_stats
from q3mega.ops import rotary
from q3mega.ops.rotary import RotaryTables

__all__ = [
    "divergence_gradient", "divergence_sums", "picked_d_hidden", "picked_d_weight",
    "picked_logits", "row_gradient", "row_stats",
]  # fmt: skip


def serves(x: Tensor) -> str | None:
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {x.device} and TRITON_INTERPRET=1 is not set"
    return "fp64 is the reference's" if x.dtype == torch.float64 else None


serves_attention = serves


def _shape(turns: RotaryTables, cu_q: Tensor, cu_k: Tensor) -> dual_chunk_attention.Shape:
    return dual_chunk_attention.Shape(cu_q.tolist(), cu_k.tolist(), *turns)


def attention_forward(
    turns: RotaryTables, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp (T, Hq)) of un-rotated q (T, Hq, D), k and v (T, Hkv, D)."""
    turned = rotary.turn(k, rotary.places(cu_k, turns.chunk), turns.cos, turns.sin)
    return dual_chunk_attention.forward(_shape(turns, cu_q, cu_k), q, turned, v)


def attention_backward(
    turns: RotaryTables, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    places = rotary.places(cu_k, turns.chunk)
    turned = rotary.turn(k, places, turns.cos, turns.sin)
    d_q, d_turned, d_v = dual_chunk_attention.backward(
        _shape(turns, cu_q, cu_k), d_out, q, turned, v, out, lse
    )
    d_k = rotary.turn(d_turned, places, turns.cos, -turns.sin)
    return d_q, d_k.to(k.dtype), d_v
