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
    alpha: float = 1,
    beta: float = 32,
) -> Tensor:
    """YaRN's NTK-by-parts frequencies (head_dim / 2,) for `factor` times `original_length`.

    Pairs that turn more than `beta` times over the original length stay, those that turn less
    than `alpha` times are interpolated, with a ramp linear in the turns between.
    """
    freq = inv_freq(head_dim, base).double()
    turns = original_length * freq / (2 * math.pi)
    keep = ((turns - alpha) / (beta - alpha)).clamp(0, 1)
    return (freq / factor * (1 - keep) + freq * keep).float()


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


class Turns(NamedTuple):
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
