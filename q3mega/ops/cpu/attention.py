"""Dual-chunk attention on the C++ tiles: forward and backward, registered with torch.library."""

from typing import Any

import torch
from torch import Tensor

from q3mega._cpu import dual_chunk_backward, dual_chunk_forward
from q3mega.ops.cpu.lm_head import serves
from q3mega.ops.dispatch import register


def _problem(
    q: Tensor, k: Tensor, inv_freq: Tensor, cu_seqlens: Tensor, chunk: int, clamp: int,
    scale: float, offset: int,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernels know beside the operands; the tensors in it must outlive the call."""
    cu_k = cu_seqlens.long().contiguous()
    cu_q = cu_k if len(q) == len(k) else torch.tensor([0, len(q)])
    longest = int(cu_k.diff().max()) if len(cu_k) > 1 else 0
    places = min(longest, chunk)  # and beyond a chunk the places of queries that look back
    places = max(places, min(2 * chunk - 1, clamp) + 1) if longest > chunk else max(places, 1)
    angle = torch.arange(places, dtype=torch.float64)[:, None] * inv_freq.double()
    tables = angle.cos().float().contiguous(), angle.sin().float().contiguous()
    sizes = len(cu_k) - 1, q.shape[1], k.shape[1], q.shape[2]
    keep = cu_q, cu_k, *tables
    return keep, (*sizes, *(x.data_ptr() for x in keep[:2]), offset, chunk, clamp,
                  *(x.data_ptr() for x in tables), scale)  # fmt: skip


@torch.library.custom_op("q3mega::dual_chunk_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, cu_seqlens: Tensor, chunk: int, clamp: int,
    scale: float, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    _keep, problem = _problem(q, k, inv_freq, cu_seqlens, chunk, clamp, scale, offset)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    dual_chunk_forward(*problem, *(x.data_ptr() for x in (q, k, v, out, lse)))
    return out, lse


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2])


@torch.library.custom_op("q3mega::dual_chunk_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, inv_freq: Tensor,
    cu_seqlens: Tensor, chunk: int, clamp: int, scale: float, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, d_out = q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous()
    _keep, problem = _problem(q, k, inv_freq, cu_seqlens, chunk, clamp, scale, offset)
    grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    operands = q, k, v, out, lse, d_out, *grads
    dual_chunk_backward(*problem, *(x.data_ptr() for x in operands))
    return grads


@_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, inv_freq, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, inv_freq, cu_seqlens)


def _pull(ctx: Any, d_out: Tensor, _: Tensor) -> Any:
    return *_backward(d_out, *ctx.saved_tensors, *ctx.options), *[None] * 6


_attention.register_autograd(_pull, setup_context=_keep)


@register("dual_chunk_attention", "cpu", serves)
def _dual_chunk_attention(
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
    operands = (x.float() for x in (q, k, v))
    out, _ = _attention(*operands, inv_freq, cu_seqlens, chunk, clamp, scale, q_offset)
    return out.to(dtype)
