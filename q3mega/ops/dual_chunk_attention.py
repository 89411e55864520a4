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

from q3mega.ops import rotary
from q3mega.ops.dispatch import register, resolve


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

    q (T, Hq, D), k and v (T, Hkv, D), un-rotated; Hq a multiple of Hkv. cu_seqlens (B + 1,) int32
    document borders (None: one sequence). inv_freq (D / 2,) overrides rope_theta. q_scale, k_scale
    (T,) fp32 factors on rotated queries and keys. clamp_at: largest distance, default chunk_size.
    q_offset: queries are tokens q_offset, q_offset + 1, ... of the one sequence that k holds whole.
    Returns (T, Hq, D). Raises ValueError on shapes that do not fit, RuntimeError on a backend that
    is not there.
    """
    if not 0 < local_size <= chunk_size - 1:
        raise ValueError(f"local_size={local_size} must lie in 1..chunk_size-1={chunk_size - 1}")
    if q.shape[1] % k.shape[1] or k.shape != v.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if q_offset and cu_seqlens is not None:
        raise ValueError("q_offset continues one sequence: give no cu_seqlens with it")
    if inv_freq is None:
        inv_freq = rotary.inv_freq(q.shape[-1], rope_theta).to(q.device)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, len(k)], dtype=torch.int32, device=q.device)
    return resolve("dual_chunk_attention", backend)(
        q,
        k,
        v,
        chunk_size=chunk_size,
        local_size=local_size,
        inv_freq=inv_freq,
        cu_seqlens=cu_seqlens,
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        q_scale=q_scale,
        k_scale=k_scale,
        clamp=chunk_size if clamp_at is None else clamp_at,
        q_offset=q_offset,
    )


@register("dual_chunk_attention", "reference")
def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    local_size: int,
    inv_freq: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    clamp: int,
    q_offset: int,
) -> Tensor:
    chunk = chunk_size - local_size
    lengths = cu_seqlens.diff().long()
    index = torch.arange(len(k), device=k.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=k.device), lengths)
    position = index - cu_seqlens.long()[document]
    longest = int(lengths.max())
    if longest > min(clamp + 1, 2 * chunk):
        key = _scaled(rotary.rotate(k, position % chunk, inv_freq), k_scale)
        spans = zip(cu_seqlens[:-1].tolist(), lengths.tolist(), strict=True)
        outs = []
        for start, length in spans:
            rows = slice(start, start + length) if q_offset == 0 else slice(0, len(q))
            part = None if q_scale is None else q_scale[rows]
            keys, values = key[start : start + length], v[start : start + length]
            outs.append(_chunked(q[rows], keys, values, inv_freq, chunk, clamp, scale, part, q_offset))
        return torch.cat(outs)
    key = _scaled(rotary.rotate(k, position, inv_freq), k_scale)
    if len(q) != len(k):  # decode, or prefill in pieces, of one sequence
        now = torch.arange(q_offset, q_offset + len(q), device=q.device)
        query = _scaled(rotary.rotate(q, now, inv_freq), q_scale)
        return _masked(query, key, v, now[:, None] >= index, scale)
    query = _scaled(rotary.rotate(q, position, inv_freq), q_scale)
    return _padded(query, key, v, document, position, lengths, scale)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor[:, None, None].to(x.dtype)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, document: Tensor, position: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Rotated documents through SDPA on a right-padded batch: causal, so padding needs no mask."""
    longest = int(lengths.max())
    if len(lengths) > 1 and longest * len(lengths) > 2 * len(q):  # mostly padding: halve by length
        short = lengths[document] <= longest // 2
        out = torch.empty_like(q)
        for rows in (short, ~short):
            kept = lengths[lengths <= longest // 2] if rows is short else lengths[lengths > longest // 2]
            if len(kept):
                renumbered = torch.repeat_interleave(torch.arange(len(kept), device=q.device), kept)
                out[rows] = _padded(
                    q[rows], k[rows], v[rows], renumbered, position[rows], kept, scale
                )
        return out
    slot = document * longest + position

    def pad(x: Tensor) -> Tensor:
        empty = x.new_zeros(len(lengths) * longest, *x.shape[1:])
        return empty.index_copy(0, slot, x).unflatten(0, (-1, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(q), pad(k), pad(v), is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)[slot]


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _chunked(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    inv_freq: Tensor,
    chunk: int,
    clamp: int,
    scale: float,
    q_scale: Tensor | None,
    q_offset: int,
) -> Tensor:
    """One sequence, one query chunk at a time: three rotations of the query, one softmax."""
    group = q.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, 1)
    value = value.repeat_interleave(group, 1)
    now = torch.arange(q_offset, q_offset + len(q), device=q.device)
    outs = []
    for n in range(q_offset // chunk, (q_offset + len(q) - 1) // chunk + 1):
        rows = slice(max(0, n * chunk - q_offset), max(0, (n + 1) * chunk - q_offset))
        offset = now[rows] % chunk
        part = None if q_scale is None else q_scale[rows]
        end = int(now[rows][-1]) + 1
        pieces = []
        for low, high, rotation in (
            (0, (n - 1) * chunk, torch.full_like(offset, min(2 * chunk - 1, clamp))),
            (max(0, n - 1) * chunk, n * chunk, (offset + chunk).clamp(max=clamp)),
            (n * chunk, end, offset),
        ):
            if high > low:
                query = _scaled(rotary.rotate(q[rows], rotation, inv_freq), part)
                pieces.append(torch.einsum("qhd,khd->hqk", query, key[low:high]))
        scores = torch.cat(pieces, -1).float() * scale
        future = torch.arange(end, device=q.device) > now[rows][:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1).to(value.dtype)
        outs.append(torch.einsum("hqk,khd->qhd", weights, value[:end]))
    return torch.cat(outs)
