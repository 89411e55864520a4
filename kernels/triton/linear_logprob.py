"""Softmax statistics of rows of logits, and the gradient of log-probability and entropy, in Triton.

Memory-bound passes over the logits that a GEMM has just written: one program a row, or a row and a
block of columns. `csrc/cpu/linear_logprob.cpp` computes the same.
"""

from torch import Tensor

import triton
import triton.language as tl
from q3mega.kernels import block_columns

MASKED = -1e30  # below every logit, and finite, so that 0 times it is 0


@triton.jit
def row_stats_kernel(Z, COLUMN, STATS, stride, columns, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(max, sum e^(z-m), sum e^(z-m)(z-m), z of the target) of a row; each lane keeps its own m."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), MASKED, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lane < columns
        z = tl.load(Z + row * stride + start + lane, mask=inside, other=MASKED)
        top = tl.maximum(m, z)
        down, d = m - top, z - top
        old, e = tl.exp(down), tl.where(inside, tl.exp(d), 0.0)
        t = old * (t + s * down) + e * d
        s = old * s + e
        m = top
    top = tl.max(m, 0)
    down = m - top
    scale = tl.exp(down)
    target = tl.load(COLUMN + row)
    here = (target >= 0) & (target < columns)
    chosen = tl.load(Z + row * stride + target, mask=here, other=0.0)
    tl.store(STATS + 4 * row, top)
    tl.store(STATS + 4 * row + 1, tl.sum(scale * s, 0))
    tl.store(STATS + 4 * row + 2, tl.sum(scale * (t + s * down), 0))
    tl.store(STATS + 4 * row + 3, chosen)


@triton.jit
def row_gradient_kernel(
    Z, COLUMN, LSE, ENTROPY, G, G_ENTROPY, stride, columns,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z becomes g (1[target] - p) - g_entropy p (ln p + H); 0 in the columns that do not count."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = Z + row * stride + v
    g, target = tl.load(G + row), tl.load(COLUMN + row)
    lp = tl.load(at, mask=v < columns, other=0.0) - tl.load(LSE + row)
    factor = g
    if WITH_ENTROPY:
        factor = g + tl.load(G_ENTROPY + row) * (lp + tl.load(ENTROPY + row))
    dz = tl.where(v == target, g, 0.0) - tl.exp(lp) * factor
    tl.store(at, tl.where(v < columns, dz, 0.0), mask=v < stride)


def row_stats(z: Tensor, columns: int, column: Tensor) -> Tensor:
    """(n, 4) of z (n, V) fp32, whose first `columns` count; column (n,): the target or -1."""
    stats = z.new_empty(len(z), 4)
    block = block_columns(columns)
    row_stats_kernel[(len(z),)](z, column, stats, z.shape[1], columns, MASKED, block, num_warps=8)
    return stats


def row_gradient(
    z: Tensor,
    columns: int,
    column: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    g_entropy: Tensor | None,
) -> None:
    """In place: the gradient of sum g log p + g_entropy H with respect to z (n, V)."""
    block = block_columns(z.shape[1])
    row_gradient_kernel[len(z), triton.cdiv(z.shape[1], block)](
        z, column, lse, entropy, g, g if g_entropy is None else g_entropy, z.shape[1], columns,
        g_entropy is not None, block, num_warps=8,
    )  # fmt: skip
