"""Dual-chunk attention on a backend's kernels, forward and backward, for torch.library."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from q3mega.ops.backends import KERNELS
from q3mega.ops.dispatch import register
from q3mega.ops.dual_chunk_attention import check_borders
from q3mega.ops.rotary import RotaryTables


def _borders(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    check_borders(cu_seqlens, len(k))
    cu_k = cu_seqlens.long().contiguous()
    return (cu_k if len(q) == len(k) else cu_k.new_tensor([0, len(q)])), cu_k


def _rotary_tables(
    inv_freq: Tensor, cu_k: Tensor, chunk: int, clamp: int, scale: float, offset: int
) -> RotaryTables:
    longest = int(cu_k.diff().max()) if len(cu_k) > 1 else 0
    positions = min(longest, chunk)
    # Queries that look back beyond their chunk use later positions too.
    positions = (
        max(positions, min(2 * chunk - 1, clamp) + 1) if longest > chunk else max(positions, 1)
    )
    index = torch.arange(positions, dtype=torch.float64, device=inv_freq.device)
    angle = index[:, None] * inv_freq.double()
    return RotaryTables(offset, chunk, clamp, scale, angle.cos().float(), angle.sin().float())


@torch.library.custom_op("q3mega::dual_chunk_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, cu_seqlens: Tensor, chunk: int, clamp: int,
    scale: float, offset: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cu_q, cu_k = _borders(q, k, cu_seqlens)
    tables = _rotary_tables(inv_freq, cu_k, chunk, clamp, scale, offset)
    operands = (x.contiguous() for x in (q, k, v))
    return KERNELS[backend].attention_forward(tables, *operands, cu_q, cu_k)


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("q3mega::dual_chunk_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, inv_freq: Tensor,
    cu_seqlens: Tensor, chunk: int, clamp: int, scale: float, offset: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    cu_q, cu_k = _borders(q, k, cu_seqlens)
    tables = _rotary_tables(inv_freq, cu_k, chunk, clamp, scale, offset)
    operands = (x.contiguous() for x in (d_out, q, k, v))
    return KERNELS[backend].attention_backward(tables, *operands, out, lse, cu_q, cu_k)


@_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, inv_freq, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, inv_freq, cu_seqlens)


def _pull(ctx: Any, d_out: Tensor, _: Tensor) -> Any:
    return *_backward(d_out, *ctx.saved_tensors, *ctx.options), *[None] * 7


_attention.register_autograd(_pull, setup_context=_keep)


def _dual_chunk_attention(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk: int,
    clamp: int,
    inv_freq: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    q_offset: int,
) -> Tensor:
    dtype = q.dtype
    if q_scale is not None:
        q = q * q_scale[:, None, None]
    if k_scale is not None:
        k = k * k_scale[:, None, None]
    wide = torch.float32 if backend == "cpu" else dtype  # no fast half precision on a CPU
    operands = (x.to(wide) for x in (q, k, v))
    out, _ = _attention(*operands, inv_freq, cu_seqlens, chunk, clamp, scale, q_offset, backend)
    return out.to(dtype)


for _name, _kernels in KERNELS.items():
    _add = register("dual_chunk_attention", _name, _kernels.serves_attention)
    _add(partial(_dual_chunk_attention, _name))
