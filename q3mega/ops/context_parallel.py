"""Dual-chunk attention of documents that are cut over ranks (context parallelism).

Every document is padded to a multiple of 2 n tokens and cut into 2 n equal pieces. Rank r of n
holds pieces r and 2 n - 1 - r, so all ranks have the same work (Megatron-LM's zigzag). Keys and
values are gathered, queries stay. A piece of queries continues its document (`q_offset`), so
positions are the document's and nothing has to be merged: the result is that of one rank. With
grouped-query attention the gathered heads are few: 4 key heads of 128 in bf16 take 256 MiB a layer
for 128k tokens.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from q3mega.errors import UserError
from q3mega.ops.dual_chunk_attention import check_borders, dual_chunk_attention


def zigzag(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """(T / size,) int64: which tokens of the pack `rank` holds, in the order it holds them.

    cu_seqlens (B + 1,): the documents' borders in the pack. Raises UserError where a document is
    not a multiple of 2 size tokens long.
    """
    indices = [torch.arange(0)]
    for start, end in pairwise(cu_seqlens.tolist()):
        if (end - start) % (2 * size):
            raise UserError(
                f"cu_seqlens: a document of {end - start} tokens cannot be cut into {2 * size} "
                f"equal pieces; pad it to a multiple of {2 * size}"
            )
        piece = (end - start) // (2 * size)
        indices += [
            torch.arange(start + i * piece, start + (i + 1) * piece) for i in _pieces(rank, size)
        ]
    return torch.cat(indices).to(cu_seqlens.device)


def _pieces(rank: int, size: int) -> tuple[int, int]:
    """Which two of a document's 2 size pieces the rank holds."""
    return rank, 2 * size - 1 - rank


class _Gather(torch.autograd.Function):
    """(T / n, ...) of each rank -> (T, ...) in the pack's order; gradients are summed back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.order, ctx.group = order, group
        parts = x.new_empty(len(order), *x.shape[1:])
        dist.all_gather_into_tensor(parts, x.contiguous(), group=group)
        return torch.empty_like(parts).index_copy_(0, order, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shard = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(shard, grad[ctx.order], group=ctx.group)
        return shard, None, None


def gather(
    tensors: Sequence[Tensor], cu_seqlens: Tensor, cp_group: dist.ProcessGroup
) -> list[Tensor]:
    """(T / n, ...) of this rank's tokens, see `zigzag` -> (T, ...) in the pack's order, of each.

    Differentiable: the ranks' gradients are summed.
    """
    size, borders = cp_group.size(), cu_seqlens.cpu()
    order = torch.cat([zigzag(borders, rank, size) for rank in range(size)])
    return [_Gather.apply(x, order.to(x.device), cp_group) for x in tensors]


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    cp_group: dist.ProcessGroup,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`dual_chunk_attention` of a pack of which this rank holds the tokens of `zigzag`.

    q (T / n, Hq, D), k and v (T / n, Hkv, D), q_scale and k_scale (T / n,): this rank's tokens.
    cu_seqlens (B + 1,): borders in the whole pack of T tokens. The other options as there. Returns
    (T / n, Hq, D). Raises UserError as it does, and for documents that cannot be cut.
    """
    size, rank = cp_group.size(), cp_group.rank()
    cu_seqlens = cu_seqlens.cpu()  # once, and not again for every rank
    check_borders(cu_seqlens, len(q) * size)
    if k_scale is not None:
        k = (k * k_scale[:, None, None]).to(k.dtype)
    k, v = gather((k, v), cu_seqlens, cp_group)
    outs, at = [q[:0]], 0
    for start, end in pairwise(cu_seqlens.tolist()):
        piece = (end - start) // (2 * size)
        for index in _pieces(rank, size) if piece else ():
            held, seen = slice(at, at + piece), slice(start, start + (index + 1) * piece)
            outs.append(
                dual_chunk_attention(
                    q[held], k[seen], v[seen], q_offset=index * piece,
                    q_scale=None if q_scale is None else q_scale[held], **options,
                )
            )  # fmt: skip
            at += piece
    return torch.cat(outs)
