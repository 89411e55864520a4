"""Dual-chunk attention in Triton: one pass over the keys, forward and a deterministic backward.

Keys come rotated by their index in their chunk. A query tile lies in one chunk and is rotated anew,
in fp32, when its chunk distance to the keys changes; running maximum, mass and output go through
all three phases (flash attention, 2307.08691). The backward recomputes the probabilities from the
log-sum-exp of the whole row. Two kernels, one stationary in the queries and one in the keys, seven
GEMMs and no atomics: every sum has one owner and one order.

A head of size D is held as its two halves, each padded to a power of two: rotation pairs d with
d + D/2, and D need not be a power of two. `csrc/cpu/dual_chunk_attention.cpp` computes the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from q3mega.kernels.tiles import key_tiles, query_tiles

MASKED = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


class Tiles(NamedTuple):
    """Rows of a tile of queries and of keys, and how a program runs over them."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 2


def forward_tiles(dtype: torch.dtype) -> Tiles:
    """fp32 tiles take twice the shared memory."""
    return Tiles(64, 32) if dtype == torch.float32 else Tiles(128, 64)


def tiles(dtype: torch.dtype) -> Tiles:
    """Of both backward kernels, which hold two accumulators of each kind."""
    return Tiles(32, 32) if dtype == torch.float32 else Tiles(64, 64)


@triton.jit
def _halves(X, row, head, heads, half, in_rows, HALF: tl.constexpr):
    """x[row, head] as two (rows, HALF) fp32 halves."""
    d = tl.arange(0, HALF)
    at = X + (row.to(tl.int64)[:, None] * heads + head) * (2 * half) + d[None, :]
    mask = in_rows[:, None] & (d < half)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + half, mask=mask, other=0.0)


@triton.jit
def _store(X, a, b, row, head, heads, half, in_rows, HALF: tl.constexpr):
    d = tl.arange(0, HALF)
    at = X + (row.to(tl.int64)[:, None] * heads + head) * (2 * half) + d[None, :]
    mask = in_rows[:, None] & (d < half)[None, :]
    tl.store(at, a.to(X.dtype.element_ty), mask=mask)
    tl.store(at + half, b.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _angle(COS, SIN, position, half, in_rows, HALF: tl.constexpr):
    d = tl.arange(0, HALF)
    at = position[:, None] * half + d[None, :]
    mask = in_rows[:, None] & (d < half)[None, :]
    return tl.load(COS + at, mask=mask, other=0.0), tl.load(SIN + at, mask=mask, other=0.0)


@triton.jit
def _rotated(Q, row, head, heads, half, in_rows, c, s, HALF: tl.constexpr):
    """The two halves of q[row, head], rotated in fp32."""
    a, b = _halves(Q, row, head, heads, half, in_rows, HALF)
    a, b = a.to(tl.float32), b.to(tl.float32)
    return (a * c - b * s).to(Q.dtype.element_ty), (b * c + a * s).to(Q.dtype.element_ty)


@triton.jit
def _dot(a, b, c, d):
    """a @ b' + c @ d': a product over both halves. fp32 operands keep their precision."""
    first = tl.dot(a, tl.trans(b), input_precision="ieee")
    return tl.dot(c, tl.trans(d), first, input_precision="ieee")


@triton.jit
def _position(index, distance, chunk, clamp):
    """The rotation of a query at `index` of its chunk for keys `distance` chunks before."""
    near = tl.where(distance == 0, index, tl.minimum(chunk + index, clamp))
    return tl.where(distance >= 2, tl.minimum(2 * chunk - 1, clamp), near)


@triton.jit
def _phase(distance: tl.constexpr, token, rows, chunk_start, chunk):
    """The keys [low, high) that are `distance` chunks (2: and more) before the queries."""
    before = tl.maximum(chunk_start - chunk, 0)
    if distance == 2:
        low, high = 0 * before, before
    elif distance == 1:
        low, high = before, chunk_start
    else:
        low, high = chunk_start, token + rows
    return low, high


@triton.jit
def _query_tile(TILES):
    """This program's row of `query_tiles`."""
    at = TILES + 4 * tl.program_id(0)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, COS, SIN, TILES, scale, chunk, clamp, heads, kv_heads, half,
    HALF: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. K is rotated."""
    head = tl.program_id(1)
    kv = head // (heads // kv_heads)
    q_row, rows, token, k_row = _query_tile(TILES)
    i = tl.arange(0, M)
    real = i < rows
    chunk_start = token // chunk * chunk
    m = tl.full((M,), MASKED, tl.float32)
    mass = tl.zeros((M,), tl.float32)
    out_a = tl.zeros((M, HALF), tl.float32)
    out_b = tl.zeros((M, HALF), tl.float32)
    for distance in tl.static_range(2, -1, -1):
        low, high = _phase(distance, token, rows, chunk_start, chunk)
        position = _position(token + i - chunk_start, 0 * token + distance, chunk, clamp)
        seen = i < tl.where(high > low, rows, 0)
        c, s = _angle(COS, SIN, position, half, seen, HALF)
        qa, qb = _rotated(Q, q_row + i, head, heads, half, seen, c, s, HALF)
        for start in range(low, high, N):
            j = start + tl.arange(0, N)
            ka, kb = _halves(K, k_row + j, kv, kv_heads, half, j < high, HALF)
            z = _dot(qa, ka, qb, kb) * (scale * LOG2E)
            z = tl.where((j < high)[None, :] & (j[None, :] <= token + i[:, None]), z, MASKED)
            top = tl.maximum(m, tl.max(z, 1))
            p = tl.exp2(z - top[:, None])
            fade = tl.exp2(m - top)
            mass = mass * fade + tl.sum(p, 1)
            va, vb = _halves(V, k_row + j, kv, kv_heads, half, j < high, HALF)
            p = p.to(V.dtype.element_ty)
            out_a = tl.dot(p, va, out_a * fade[:, None], input_precision="ieee")
            out_b = tl.dot(p, vb, out_b * fade[:, None], input_precision="ieee")
            m = top
    mass = tl.where(real, mass, 1.0)
    _store(
        OUT, out_a / mass[:, None], out_b / mass[:, None], q_row + i, head, heads, half, real, HALF
    )
    tl.store(LSE + (q_row + i) * heads + head, (m + tl.log2(mass)) / LOG2E, mask=real)


@triton.jit
def query_gradient_kernel(
    D_OUT, Q, K, V, LSE, DELTA, D_Q, COS, SIN, TILES, scale, chunk, clamp, heads, kv_heads, half,
    HALF: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries: each phase's gradient is turned back by the phase's angle."""
    head = tl.program_id(1)
    kv = head // (heads // kv_heads)
    q_row, rows, token, k_row = _query_tile(TILES)
    i = tl.arange(0, M)
    real = i < rows
    chunk_start = token // chunk * chunk
    go_a, go_b = _halves(D_OUT, q_row + i, head, heads, half, real, HALF)
    lse = tl.load(LSE + (q_row + i) * heads + head, mask=real, other=0.0) * LOG2E
    delta = tl.load(DELTA + (q_row + i) * heads + head, mask=real, other=0.0)
    for distance in tl.static_range(2, -1, -1):
        low, high = _phase(distance, token, rows, chunk_start, chunk)
        position = _position(token + i - chunk_start, 0 * token + distance, chunk, clamp)
        seen = i < tl.where(high > low, rows, 0)
        c, s = _angle(COS, SIN, position, half, seen, HALF)
        qa, qb = _rotated(Q, q_row + i, head, heads, half, seen, c, s, HALF)
        dq_a = tl.zeros((M, HALF), tl.float32)
        dq_b = tl.zeros((M, HALF), tl.float32)
        for start in range(low, high, N):
            j = start + tl.arange(0, N)
            ka, kb = _halves(K, k_row + j, kv, kv_heads, half, j < high, HALF)
            va, vb = _halves(V, k_row + j, kv, kv_heads, half, j < high, HALF)
            z = _dot(qa, ka, qb, kb) * (scale * LOG2E)
            near = (j < high)[None, :] & (j[None, :] <= token + i[:, None])
            p = tl.where(near, tl.exp2(z - lse[:, None]), 0.0)
            ds = (p * (_dot(go_a, va, go_b, vb) - delta[:, None])).to(K.dtype.element_ty)
            dq_a = tl.dot(ds, ka, dq_a, input_precision="ieee")
            dq_b = tl.dot(ds, kb, dq_b, input_precision="ieee")
        # The sum over phases lives in memory: registers are what this kernel lacks.
        c, s = _angle(COS, SIN, position, half, seen, HALF)
        sum_a, sum_b = _halves(D_Q, q_row + i, head, heads, half, real & (distance < 2), HALF)
        sum_a += (dq_a * c + dq_b * s) * scale
        sum_b += (dq_b * c - dq_a * s) * scale
        _store(D_Q, sum_a, sum_b, q_row + i, head, heads, half, real, HALF)


@triton.jit
def key_gradient_kernel(
    D_OUT, Q, K, V, LSE, DELTA, D_K, D_V, COS, SIN, TILES, scale, chunk, clamp, heads, kv_heads,
    half, HALF: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk (of the rotated key) and dv of one tile of keys, over its group of heads."""
    tile, kv = tl.program_id(0), tl.program_id(1)
    group = heads // kv_heads
    k_row, rows = tl.load(TILES + 6 * tile), tl.load(TILES + 6 * tile + 1)
    token = tl.load(TILES + 6 * tile + 2)  # the tile's first, all of one chunk
    q_row, first = tl.load(TILES + 6 * tile + 3), tl.load(TILES + 6 * tile + 4)
    last = first + tl.load(TILES + 6 * tile + 5)  # the queries are tokens [first, last)
    j = tl.arange(0, N)
    real = j < rows
    ka, kb = _halves(K, k_row + j, kv, kv_heads, half, real, HALF)
    va, vb = _halves(V, k_row + j, kv, kv_heads, half, real, HALF)
    dk_a = tl.zeros((N, HALF), tl.float32)
    dk_b = tl.zeros((N, HALF), tl.float32)
    dv_a = tl.zeros((N, HALF), tl.float32)
    dv_b = tl.zeros((N, HALF), tl.float32)
    for head in range(kv * group, (kv + 1) * group):
        for chunk_start in range(token // chunk * chunk, last, chunk):
            distance = (chunk_start - token // chunk * chunk) // chunk
            begin = tl.maximum(tl.maximum(chunk_start, first), token)
            end = tl.minimum(chunk_start + chunk, last)
            for start in range(begin, end, M):
                t = start + tl.arange(0, M)
                live = t < end
                row = q_row + t - first
                position = _position(t - chunk_start, distance, chunk, clamp)
                c, s = _angle(COS, SIN, position, half, live, HALF)
                qa, qb = _rotated(Q, row, head, heads, half, live, c, s, HALF)
                go_a, go_b = _halves(D_OUT, row, head, heads, half, live, HALF)
                lse = tl.load(LSE + row * heads + head, mask=live, other=0.0) * LOG2E
                delta = tl.load(DELTA + row * heads + head, mask=live, other=0.0)
                z = _dot(ka, qa, kb, qb) * (scale * LOG2E)  # (keys, queries)
                seen = real[:, None] & live[None, :] & ((token + j)[:, None] <= t[None, :])
                p = tl.where(seen, tl.exp2(z - lse[None, :]), 0.0)
                ds = p * (_dot(va, go_a, vb, go_b) - delta[None, :])
                p, ds = p.to(V.dtype.element_ty), ds.to(K.dtype.element_ty)
                dv_a = tl.dot(p, go_a, dv_a, input_precision="ieee")
                dv_b = tl.dot(p, go_b, dv_b, input_precision="ieee")
                dk_a = tl.dot(ds, qa, dk_a, input_precision="ieee")
                dk_b = tl.dot(ds, qb, dk_b, input_precision="ieee")
    _store(D_K, dk_a * scale, dk_b * scale, k_row + j, kv, kv_heads, half, real, HALF)
    _store(D_V, dv_a, dv_b, k_row + j, kv, kv_heads, half, real, HALF)


class Shape(NamedTuple):
    """What the kernels know beside the operands. cu_q, cu_k: borders of the sequences' rows."""

    cu_q: Sequence[int]
    cu_k: Sequence[int]
    offset: int
    chunk: int
    clamp: int
    scale: float
    cos: Tensor  # (positions, D / 2) fp32
    sin: Tensor


def forward(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out (Tq, Hq, D), log-sum-exp (Tq, Hq) fp32); k (Tk, Hkv, D) rotated, q not."""
    heads, kv_heads, half = q.shape[1], k.shape[1], q.shape[2] // 2
    t = forward_tiles(q.dtype)
    tile_list = query_tiles(shape.cu_q, shape.cu_k, shape.offset, shape.chunk, t.queries).to(
        q.device
    )
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    if len(tile_list):
        forward_kernel[len(tile_list), heads](
            q, k, v, out, lse, shape.cos, shape.sin, tile_list, shape.scale, shape.chunk,
            shape.clamp, heads, kv_heads, half, max(16, triton.next_power_of_2(half)), t.queries,
            t.keys, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out, lse


def backward(
    shape: Shape, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk of the rotated key in fp32, dv)."""
    heads, kv_heads, half = q.shape[1], k.shape[1], q.shape[2] // 2
    delta = (d_out.float() * out.float()).sum(-1)
    d_q, d_k, d_v = (
        torch.empty_like(q),
        torch.empty_like(k, dtype=torch.float32),
        torch.empty_like(v),
    )
    t = tiles(q.dtype)
    common = (
        shape.scale, shape.chunk, shape.clamp, heads, kv_heads, half,
        max(16, triton.next_power_of_2(half)),
    )  # fmt: skip
    for kernel, size, cut, grads, count in (
        (query_gradient_kernel, t.queries, query_tiles, (d_q,), heads),
        (key_gradient_kernel, t.keys, key_tiles, (d_k, d_v), kv_heads),
    ):
        tile_list = cut(shape.cu_q, shape.cu_k, shape.offset, shape.chunk, size).to(q.device)
        if len(tile_list):
            kernel[len(tile_list), count](
                d_out, q, k, v, lse, delta, *grads, shape.cos, shape.sin, tile_list, *common,
                t.queries, t.keys, num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
    return d_q.to(q.dtype), d_k, d_v
