"""Dual-chunk attention (arXiv 2402.17463, in the form of the deployed Qwen models).

Keys of chunk m are rotated by their index within the chunk. A query sees its own chunk at exact
distances, the chunk before at distances exact for the nearest `local_size` keys, and all older
chunks at one constant: no distance is larger than training knew. With c = chunk_size - local_size,
a query at offset i' of its chunk is rotated by i' (own chunk), min(c + i', clamp) (previous) or
min(2c - 1, clamp) (older). Sequences up to min(clamp + 1, 2c) tokens get ordinary RoPE attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from q3mega.errors import UserError
from q3mega.ops import rotary
from q3mega.ops.dispatch import register, resolve

MAX_SCORES = 1 << 22  # attention scores that `_chunked` holds at once: 16 MiB in fp32


def dual_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    local_size: int,
    inv_freq: Tensor | None = None,
    rope_theta: float = 1e6,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    clamp_at: int | None = None,
    q_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of packed sequences, positions included.

    q (T, Hq, D), k and v (T, Hkv, D): un-rotated; Hq a multiple of Hkv
    chunk_size, local_size: tokens, see the module's text
    inv_freq (D / 2,), radians a token: overrides rope_theta
    cu_seqlens (B + 1,) int32: document borders; None is one sequence
    q_scale, k_scale (T,) fp32: factors on rotated queries and keys
    clamp_at: largest distance between a query and a key of an earlier chunk, default chunk_size
    q_offset: queries are tokens q_offset, q_offset + 1, ... of the one sequence that k holds whole
    backend: see `q3mega.ops.dispatch`

    Returns (T, Hq, D) in q's dtype. Raises UserError on arguments that do not fit, RuntimeError on
    a backend that is not there.
    """
    _check(q, k, v, chunk_size, local_size, cu_seqlens, q_offset, clamp_at)
    _check_rows(q, k, inv_freq, q_scale, k_scale)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, len(k)], dtype=torch.int32, device=q.device)
    if inv_freq is None:
        inv_freq = rotary.inv_freq(q.shape[-1], rope_theta).to(q.device)
    out: Tensor = resolve("dual_chunk_attention", backend, q)(
        q,
        k,
        v,
        chunk=chunk_size - local_size,
        clamp=chunk_size if clamp_at is None else clamp_at,
        inv_freq=inv_freq,
        cu_seqlens=cu_seqlens,
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        q_scale=q_scale,
        k_scale=k_scale,
        q_offset=q_offset,
    )
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    local_size: int,
    cu_seqlens: Tensor | None,
    q_offset: int,
    clamp_at: int | None,
) -> None:
    """Raise UserError on operands or sizes that do not fit each other."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dim() != 3 or x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise UserError(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device}: must be (T, H, D), floating "
                f"point, and as q is, {q.dtype} on {q.device}"
            )
    if not 0 <= local_size < chunk_size:
        raise UserError(f"local_size={local_size}: must lie in 0..chunk_size-1={chunk_size - 1}")
    if k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2] or q.shape[2] % 2:
        raise UserError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be (T, Hq, D) and "
            "twice (T, Hkv, D), Hq a multiple of Hkv and D even"
        )
    if cu_seqlens is None:
        if not 0 <= q_offset <= len(k) - len(q):
            raise UserError(
                f"q_offset={q_offset}: {len(q)} queries must lie within the {len(k)} keys"
            )
    elif q_offset or len(q) != len(k):
        raise UserError(
            f"q_offset={q_offset}, {len(q)} queries, {len(k)} keys: cu_seqlens takes whole "
            "sequences, leave it out to continue one"
        )
    if clamp_at is not None and clamp_at < 1:
        raise UserError(f"clamp_at={clamp_at}: must be at least 1")


def _check_rows(
    q: Tensor, k: Tensor, inv_freq: Tensor | None, q_scale: Tensor | None, k_scale: Tensor | None
) -> None:
    """Raise UserError on scales or frequencies of another shape."""
    for name, scales, tokens in (("q_scale", q_scale, len(q)), ("k_scale", k_scale, len(k))):
        if scales is not None and scales.shape != (tokens,):
            raise UserError(f"{name} {tuple(scales.shape)}: must be ({tokens},)")
    if inv_freq is not None and inv_freq.shape != (q.shape[2] // 2,):
        raise UserError(f"inv_freq {tuple(inv_freq.shape)}: must be ({q.shape[2] // 2},)")


def check_borders(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise UserError unless the documents' borders rise from 0 to the number of tokens."""
    borders = cu_seqlens.tolist()
    if not borders or borders[0] != 0 or borders[-1] != tokens or borders != sorted(borders):
        raise UserError(f"cu_seqlens: must rise from 0 to {tokens}, the number of tokens")


@register("dual_chunk_attention", "reference")
def _reference(
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
    check_borders(cu_seqlens, len(k))
    borders, lengths = cu_seqlens.tolist(), cu_seqlens.diff().long()
    # Scales commute with rotations, so they are applied once, first.
    if q_scale is not None:
        q = (q * q_scale[:, None, None]).to(q.dtype)
    if k_scale is not None:
        k = (k * k_scale[:, None, None]).to(k.dtype)
    if len(q) != len(k):  # decode, or prefill in pieces, of one sequence
        return _chunked(q, k, v, inv_freq, chunk, clamp, scale, q_offset)
    plain = lengths <= min(clamp + 1, 2 * chunk)  # dual-chunk attention is RoPE attention there
    index, starts = torch.arange(len(q), device=q.device), cu_seqlens[:-1].long()
    tokens, outs = [index[:0]], [q[:0]]
    for documents in _buckets(lengths, plain):
        reach = torch.arange(int(lengths[documents].max()), device=q.device)
        token = starts[documents, None] + reach  # right-padded with whatever follows
        real = reach < lengths[documents, None]
        padded = token.clamp(max=len(q) - 1)
        out = _causal(q[padded], k[padded], v[padded], reach, inv_freq, scale)
        tokens.append(token[real])
        outs.append(out[real])
    for i in (~plain).nonzero()[:, 0].tolist():
        document = slice(borders[i], borders[i + 1])
        tokens.append(index[document])
        outs.append(
            _chunked(q[document], k[document], v[document], inv_freq, chunk, clamp, scale, 0)
        )
    return torch.empty_like(q).index_copy_(0, torch.cat(tokens), torch.cat(outs))


def _buckets(lengths: Tensor, chosen: Tensor) -> list[Tensor]:
    """The chosen documents in groups of like length: padding adds at most half to their work."""
    left, groups = (chosen & (lengths > 0)).nonzero()[:, 0], []
    while len(left):
        size = lengths[left]
        longest = size.max()
        even = len(left) * longest**2 <= 1.5 * size.square().sum()
        near = torch.ones_like(size, dtype=torch.bool) if even else size > longest // 2
        groups.append(left[near])
        left = left[~near]
    return groups


def _causal(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, inv_freq: Tensor, scale: float
) -> Tensor:
    """RoPE attention of a batch (B, S, H, D). Nothing looks right, so padding needs no mask."""
    query, key = (rotary.rotate(x, position, inv_freq).transpose(1, 2) for x in (q, k))
    gqa = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        query, key, v.transpose(1, 2), is_causal=True, scale=scale, enable_gqa=gqa
    )
    return out.transpose(1, 2)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    chunk: int,
    clamp: int,
    scale: float,
    q_offset: int,
) -> Tensor:
    """One sequence in blocks of queries, none across chunks; each is recomputed in the backward."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    position = torch.arange(len(k), device=k.device) % chunk
    key, value = rotary.rotate(k.to(dtype), position, inv_freq), v.to(dtype)
    step = max(1, MAX_SCORES // (q.shape[1] * len(k)))
    outs, start, end = [], q_offset, q_offset + len(q)
    while start < end:
        stop = min(start + step, (start // chunk + 1) * chunk, end)
        query = q[start - q_offset : stop - q_offset].to(dtype)
        outs.append(
            checkpoint(
                _block,
                query,
                key[:stop],
                value[:stop],
                inv_freq,
                chunk,
                clamp,
                scale,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
        start = stop
    return torch.cat(outs).to(q.dtype)


def _block(
    q: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor, chunk: int, clamp: int, scale: float
) -> Tensor:
    """The last len(q) tokens of `key`, all in its last chunk: three rotations, one softmax."""
    token = torch.arange(len(key) - len(q), len(key), device=q.device)
    chunk_start = (len(key) - 1) // chunk * chunk  # of the queries
    previous = max(0, chunk_start - chunk)
    offset = token - chunk_start
    scores = []
    for low, high, angle in (
        (0, previous, torch.full_like(offset, min(2 * chunk - 1, clamp))),
        (previous, chunk_start, (chunk + offset).clamp(max=clamp)),
        (chunk_start, len(key), offset),
    ):
        query = rotary.rotate(q, angle, inv_freq).unflatten(1, (key.shape[1], -1))
        scores.append(torch.einsum("qhgd,khd->hgqk", query * scale, key[low:high]))
    future = torch.arange(len(key), device=q.device) > token[:, None]
    weights = torch.cat(scores, -1).masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hgqk,khd->qhgd", weights, value).flatten(1, 2)
