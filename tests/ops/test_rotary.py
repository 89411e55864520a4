"""Rotary angles against complex arithmetic and the limits of YaRN."""

import math

import pytest
import torch

from q3mega.ops import rotary


def test_rotation_is_complex_multiplication() -> None:
    x = torch.randn(7, 3, 16, dtype=torch.float64)
    position, freq = torch.tensor([0, 1, 5, 9, 262_143, 3, 2]), rotary.inv_freq(16, 1e4)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(
        torch.ones(7, 1, 8, dtype=torch.float64), position[:, None, None] * freq.double()
    )
    ours = rotary.rotate(x, position, freq)
    torch.testing.assert_close(ours, torch.cat([turned.real, turned.imag], -1))
    single = rotary.rotate(x.float(), position, freq)  # angles stay exact far out
    torch.testing.assert_close(single, ours.float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(rotary.rotate(x[None], position, freq)[0], ours)


def test_frequencies() -> None:
    assert rotary.inv_freq(4, 100.0).tolist() == pytest.approx([1.0, 0.1])
    base, factor, length = 1e6, 4.0, 32_768
    plain, yarn = rotary.inv_freq(128, base), rotary.yarn_inv_freq(128, base, factor, length)
    for f, y in zip(plain.tolist(), yarn.tolist(), strict=True):
        turns = length * f / (2 * math.pi)
        keep = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
        assert y == pytest.approx((1 - keep) * f / factor + keep * f, rel=1e-6)
    assert rotary.yarn_attention_factor(4.0) == pytest.approx(1.138629, abs=1e-6)
    assert rotary.yarn_attention_factor(1.0) == 1.0
