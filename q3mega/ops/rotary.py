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

    def pair(turns: float) -> float:
        """The index, a fraction, of the pair that turns so often over the original length."""
        wavelength = original_length / turns / (2 * math.pi)
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
    work = torch.promote_types(x.dtype, torch.float32)
    return _turn(x, angle.cos().to(work), angle.sin().to(work))


class RotaryTables(NamedTuple):
    """How dual-chunk attention turns queries and keys, for kernels that look angles up."""

    offset: int  # of the first query's token
    chunk: int
    clamp: int
    scale: float
    cos: Tensor  # (positions, D / 2) fp32, of every position that a rotation uses
    sin: Tensor


def places(cu_seqlens: Tensor, chunk: int) -> Tensor:
    """(T,): every packed token's place in its chunk."""
    index = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    return (index - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())) % chunk


def turn(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` by tables (positions, D / 2)."""
    return _turn(x, cos[position], sin[position])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
