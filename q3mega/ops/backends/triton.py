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
    """Why the backend cannot take the operand, or None."""
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {x.device} and TRITON_INTERPRET=1 is not set"
    return "fp64 is the reference's" if x.dtype == torch.float64 else None


serves_attention = serves


def _shape(tables: RotaryTables, cu_q: Tensor, cu_k: Tensor) -> dual_chunk_attention.Shape:
    return dual_chunk_attention.Shape(cu_q.tolist(), cu_k.tolist(), *tables)


def attention_forward(
    tables: RotaryTables, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp (T, Hq)) of un-rotated q (T, Hq, D), k and v (T, Hkv, D)."""
    rotated_k = rotary.rotate_by_tables(
        k, rotary.positions_in_chunk(cu_k, tables.chunk), tables.cos, tables.sin
    )
    return dual_chunk_attention.forward(_shape(tables, cu_q, cu_k), q, rotated_k, v)


def attention_backward(
    tables: RotaryTables, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    positions = rotary.positions_in_chunk(cu_k, tables.chunk)
    rotated_k = rotary.rotate_by_tables(k, positions, tables.cos, tables.sin)
    d_q, d_rotated_k, d_v = dual_chunk_attention.backward(
        _shape(tables, cu_q, cu_k), d_out, q, rotated_k, v, out, lse
    )
    d_k = rotary.rotate_by_tables(d_rotated_k, positions, tables.cos, -tables.sin)
    return d_q, d_k.to(k.dtype), d_v
