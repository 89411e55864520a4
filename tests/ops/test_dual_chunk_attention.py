"""Against a brute-force matrix of relative positions, by complex rotation in float64."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q3mega import ops
from q3mega.errors import UserError
from q3mega.ops import rotary

THETA = 100.0


def make(n: int, hq: int = 4, hkv: int = 2, d: int = 8, dtype: torch.dtype = torch.float64):
    torch.manual_seed(n)
    shapes = ((n, hq, d), (n, hkv, d), (n, hkv, d))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def distance(i: int, j: int, chunk_size: int, local_size: int, clamp: int) -> int:
    c = chunk_size - local_size
    back = i // c - j // c
    if back == 0:
        return i - j
    return (min(c + i % c, clamp) if back == 1 else min(2 * c - 1, clamp)) - j % c


def brute(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
    """softmax over j <= i of Re(sum q conj(k) e^(i M(i, j) f)) / sqrt(D), one sequence."""
    d = q.shape[-1]
    freq = rotary.inv_freq(d, THETA).double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    qc, kc = (torch.complex(x[..., : d // 2], x[..., d // 2 :]) for x in (q, k))
    turn = torch.polar(torch.ones_like(freq), relative[..., None] * freq)
    scores = torch.einsum("ihd,jhd,ijd->hij", qc, kc.conj(), turn).real / d**0.5
    mask = torch.ones(len(q), len(k)).tril().bool()
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def matrix(n: int, *settings: int) -> Tensor:
    return torch.tensor(
        [[distance(i, j, *settings) if j <= i else 0 for j in range(n)] for i in range(n)]
    ).double()


def rope(n: int) -> Tensor:
    index = torch.arange(n).double()
    return index[:, None] - index


def agree(out: Tensor, expected: Tensor, leaves: list[Tensor], tol: float = 1e-11) -> None:
    torch.testing.assert_close(out, expected, atol=tol, rtol=tol)
    seed = torch.randn_like(out)
    ours = torch.autograd.grad(out, leaves, seed)
    theirs = torch.autograd.grad(expected, leaves, seed)
    torch.testing.assert_close(ours, theirs, atol=tol, rtol=tol)


@pytest.mark.parametrize("n", [1, 5, 6, 7, 11, 12, 31])
@pytest.mark.parametrize(("chunk_size", "local_size"), [(8, 2), (8, 1), (8, 0), (8, 4), (8, 6)])
@pytest.mark.parametrize("below", [0, 1])
def test_matches_the_relative_position_matrix(n, chunk_size, local_size, below) -> None:
    q, k, v = make(n)
    clamp = chunk_size - below
    out = ops.dual_chunk_attention(
        q, k, v, chunk_size=chunk_size, local_size=local_size, rope_theta=THETA, clamp_at=clamp
    )
    agree(out, brute(q, k, v, matrix(n, chunk_size, local_size, clamp)), [q, k, v])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_any_sizes_match(n: int, chunk_size: int, data: st.DataObject) -> None:
    local_size = data.draw(st.integers(0, chunk_size - 1))
    q, k, v = make(n, 2, 1, 4)
    out = ops.dual_chunk_attention(
        q, k, v, chunk_size=chunk_size, local_size=local_size, rope_theta=THETA
    )
    agree(out, brute(q, k, v, matrix(n, chunk_size, local_size, chunk_size)), [q, k, v])


@pytest.mark.parametrize("below", [0, 1])
def test_is_rope_up_to_the_clamp_plus_one_and_not_beyond(below: int) -> None:
    clamp = 16 - below
    for n in (clamp, clamp + 1, clamp + 2):
        q, k, v = make(n)
        out = ops.dual_chunk_attention(
            q, k, v, chunk_size=16, local_size=4, rope_theta=THETA, clamp_at=clamp
        )
        gap = (out - brute(q, k, v, rope(n))).abs().max()
        assert (gap < 1e-12) == (n <= clamp + 1), n


def test_long_sequences_can_have_plain_rope() -> None:
    q, k, v = make(150)
    out = ops.dual_chunk_attention(q, k, v, chunk_size=1 << 30, local_size=1, rope_theta=THETA)
    agree(out, brute(q, k, v, rope(150)), [q, k, v])


@pytest.mark.parametrize("hkv", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [1 << 30, 8])
def test_packed_is_per_sequence_and_heads_are_grouped(hkv: int, chunk_size: int) -> None:
    lengths = [1, 3, 40, 0, 2, 17, 9, 8, 1, 2, 39]  # several buckets, an empty document
    q, k, v = make(sum(lengths), 4, hkv)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    out = ops.dual_chunk_attention(
        q, k, v, chunk_size=chunk_size, local_size=2, rope_theta=THETA, cu_seqlens=cu
    )
    one = [
        brute(*(x.split(lengths)[i] for x in (q, k, v)), matrix(n, chunk_size, 2, chunk_size))
        for i, n in enumerate(lengths)
        if n
    ]
    agree(out, torch.cat(one), [q, k, v])


@pytest.mark.parametrize("chunk_size", [1 << 30, 8])
@pytest.mark.parametrize("step", [1, 4, 13])
def test_decode_and_prefill_in_pieces_equal_prefill(chunk_size: int, step: int) -> None:
    n = 27
    q, k, v = make(n)
    q_scale, k_scale = torch.rand(n) + 0.5, torch.rand(n) + 0.5
    kw = {"chunk_size": chunk_size, "local_size": 2, "rope_theta": THETA}
    at_once = ops.dual_chunk_attention(q, k, v, q_scale=q_scale, k_scale=k_scale, **kw)
    pieces = []
    for i in range(0, n, step):
        end = min(i + step, n)
        kept = {"q_scale": q_scale[i:end], "k_scale": k_scale[:end], "q_offset": i}
        pieces.append(ops.dual_chunk_attention(q[i:end], k[:end], v[:end], **kept, **kw))
    agree(torch.cat(pieces), at_once, [q, k, v])
    later = ops.dual_chunk_attention(q[3:9], k, v, q_offset=3, k_scale=k_scale, **kw)
    some = ops.dual_chunk_attention(q[3:9], k[:9], v[:9], q_offset=3, k_scale=k_scale[:9], **kw)
    torch.testing.assert_close(later, some, atol=1e-12, rtol=1e-12)  # future keys are not seen


@pytest.mark.parametrize("chunk_size", [1 << 30, 8])
def test_scales_multiply_queries_and_keys(chunk_size: int) -> None:
    q, k, v = make(20)
    q_scale, k_scale = torch.rand(20) + 0.5, torch.rand(20) + 0.5
    kw = {"chunk_size": chunk_size, "local_size": 2, "softmax_scale": 0.3}
    out = ops.dual_chunk_attention(q, k, v, q_scale=q_scale, k_scale=k_scale, **kw)
    by_hand = ops.dual_chunk_attention(
        q * q_scale[:, None, None], k * k_scale[:, None, None], v, **kw
    )
    agree(out, by_hand, [q, k, v])


@pytest.mark.parametrize("chunk_size", [1 << 30, 8])
def test_small_query_blocks_change_nothing(chunk_size: int, monkeypatch) -> None:
    q, k, v = make(33)
    kw = {"chunk_size": chunk_size, "local_size": 3}
    out = ops.dual_chunk_attention(q[5:], k, v, q_offset=5, **kw)
    module = import_module("q3mega.ops.dual_chunk_attention")  # the name in ops is the function
    monkeypatch.setattr(module, "MAX_SCORES", 3 * 4 * 33)
    agree(ops.dual_chunk_attention(q[5:], k, v, q_offset=5, **kw), out, [q, k, v])


@pytest.mark.parametrize("chunk_size", [1 << 30, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_pytorch(chunk_size: int, dtype) -> None:
    q, k, v = make(90, d=32, dtype=dtype)
    kw = {"chunk_size": chunk_size, "local_size": 4, "rope_theta": THETA}
    relative = matrix(90, chunk_size, 4, chunk_size)
    exact = brute(q.double(), k.double(), v.double(), relative)
    freq, group = rotary.inv_freq(32, THETA), 2
    cos, sin = (f(relative.float()[..., None] * freq).to(dtype) for f in (torch.cos, torch.sin))
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.repeat_interleave(group, 1).chunk(2, -1)
    scores = torch.einsum("ijd,ihd,jhd->hij", cos, q1, k1)
    scores = scores + torch.einsum("ijd,ihd,jhd->hij", cos, q2, k2)
    scores = scores + torch.einsum("ijd,ihd,jhd->hij", sin, q1, k2)
    scores = scores - torch.einsum("ijd,ihd,jhd->hij", sin, q2, k1)
    mask = torch.ones(90, 90).triu(1).bool()
    weights = (scores * 32**-0.5).masked_fill(mask, -torch.inf).softmax(-1)
    plain = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(group, 1))
    out = ops.dual_chunk_attention(q, k, v, **kw)
    assert out.dtype == dtype
    assert (out - exact).norm() <= 2 * (plain - exact).norm()


def test_empty_input() -> None:
    q, k, v = make(0)
    kw = {"chunk_size": 8, "local_size": 2}
    assert ops.dual_chunk_attention(q, k, v, **kw).shape == q.shape
    cu = torch.tensor([0], dtype=torch.int32)
    assert ops.dual_chunk_attention(q, k, v, cu_seqlens=cu, **kw).shape == q.shape


@pytest.mark.parametrize(
    "bad",
    [
        {"local_size": 8},
        {"local_size": -1},
        {"q_offset": 1},
        {"q_offset": -1},
        {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([1, 6], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 4, 3, 6], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32), "q_offset": 1},
    ],
)
def test_bad_arguments_are_refused(bad) -> None:
    q, k, v = make(6)
    with pytest.raises(UserError):
        ops.dual_chunk_attention(q, k, v, **({"chunk_size": 8, "local_size": 2} | bad))
    with pytest.raises(UserError):
        ops.dual_chunk_attention(q, k[:, :1].expand(6, 3, 8), v, chunk_size=8, local_size=2)
