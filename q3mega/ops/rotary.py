"""Rotary position angles: RoPE (arXiv 2104.09864) and YaRN's interpolation (2309.00071)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def inv_freq(head_dim: int, base: float) -> Tensor:
    """(head_dim / 2,) fp32 radians a token: base^(-2i / head_dim)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (base**-exponent).float()


def yarn_inv_freq(
    head_dim: int,
    base: float,
    factor: float,
    original_length: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    *,
    truncate: bool = True,
) -> Tensor:
    """YaRN's frequencies (head_dim / 2,) for `factor` times `original_length`, as transformers and
    the servers compute them from the parameters of the same names.

    Pairs that turn more than `beta_fast` times over the original length stay, those that turn less
    than `beta_slow` times are interpolated, with a ramp linear in the pair's index between; its
    ends are whole pairs with `truncate`.
    """

    def pair(rotations: float) -> float:
        """The index, a fraction, of the pair with that many rotations over the original length."""
        wavelength = original_length / rotations / (2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(base))

    first, last = pair(beta_fast), pair(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 1e-3 * (first == last)
    index = torch.arange(head_dim // 2, dtype=torch.float64)
    interpolated = ((index - first) / (last - first)).clamp(0, 1)
    freq = inv_freq(head_dim, base).double()
    return (freq / factor * interpolated + freq * (1 - interpolated)).float()


def yarn_attention_factor(factor: float) -> float:
    """What YaRN multiplies both rotated operands by: 0.1 ln(factor) + 1."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def rotate(x: Tensor, position: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate x (..., T, H, D) by position (T,), rotate-half layout (pairs d, d + D/2).

    Angles are fp64 products of inv_freq (D / 2,): in fp32 they are off by 0.01 rad at position
    262,144. Half-precision x is rotated in fp32 and rounded once.
    """
    angle = position.double()[:, None] * inv_freq.double()
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _rotate_half(x, angle.cos().to(dtype), angle.sin().to(dtype))


class RotaryTables(NamedTuple):
    """Cosines and sines for the kernels of dual-chunk attention, and the numbers beside them.

    offset: index in its sequence of the first query
    chunk: tokens of a chunk that keys are rotated by (chunk_size - local_size)
    clamp: largest distance between a query and a key of an earlier chunk
    scale: softmax scale
    cos, sin (positions, D / 2) fp32: one row for every position that a rotation uses
    """

    offset: int
    chunk: int
    clamp: int
    scale: float
    cos: Tensor
    sin: Tensor


def positions_in_chunk(cu_seqlens: Tensor, chunk: int) -> Tensor:
    """(T,) int64: every packed token's index in its chunk, from its document's start."""
    index = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    return (index - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())) % chunk


def rotate_by_tables(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` x (T, H, D) by position (T,) with cosines and sines (positions, D / 2)."""
    return _rotate_half(x, cos[position], sin[position])


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
