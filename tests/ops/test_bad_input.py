"""What no operator can take is refused by name, by the reference (fp64) and the kernels (fp32)."""

import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch

from q3mega import ops
from q3mega.errors import UserError

N, H, V = 5, 6, 9
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["reference", "cpu"])


def policy(dtype, **change):
    g = torch.Generator().manual_seed(0)
    rows = {
        name: torch.rand(N, generator=g)
        for name in ("advantages", "old_logprobs", "loss_weights", "ref_logprobs")
    }
    operands = {
        "hidden": torch.randn(N, H, generator=g, dtype=dtype),
        "weight": torch.randn(V, H, generator=g, dtype=dtype),
        "targets": torch.arange(N),
    }
    return ops.grpo_loss(**(operands | rows | change))


def distil(dtype, ids, logprobs, **options):
    hidden, weight = torch.ones(N, H, dtype=dtype), torch.ones(V, H, dtype=dtype)
    return ops.distill_loss(hidden, weight, teacher_topk=(ids, logprobs), **options)


@BOTH
@pytest.mark.parametrize("bad", [-1, V, 3 * V])
def test_ids_out_of_the_vocabulary(dtype, bad):
    ids = torch.tensor([0, 1, 2, 3, bad])
    hidden, weight = torch.ones(N, H, dtype=dtype), torch.ones(V, H, dtype=dtype)
    for call in (
        lambda: ops.linear_logprob(hidden, weight, ids),
        lambda: policy(dtype, targets=ids),
        lambda: policy(dtype, targets=ids, variant="gspo", seq_ids=torch.zeros(N).long()),
        lambda: distil(dtype, ids[:, None], torch.zeros(N, 1)),
        lambda: distil(dtype, ids[:, None], torch.zeros(N, 1), tail=False),
    ):
        with pytest.raises(UserError, match=rf"ids lie in .*the vocabulary has 0\.\.{V - 1}"):
            call()


@BOTH
def test_ids_in_the_padding_of_the_vocabulary(dtype):
    with pytest.raises(UserError, match=r"0\.\.6"):
        policy(dtype, targets=torch.full((N,), 7), valid_vocab=7)


@BOTH
def test_a_token_without_weight_may_have_any_target(dtype):
    weights = torch.tensor([1.0, 0, 1, 0, 1])
    masked = torch.where(weights != 0, torch.arange(N), -100)
    expected, actual = (
        policy(dtype, loss_weights=weights, targets=t) for t in (torch.arange(N), masked)
    )
    assert torch.equal(actual.loss, expected.loss)
    top = torch.zeros(N, 2)
    one, two = (
        distil(dtype, torch.stack([t, t + 1], 1), top, loss_weights=weights)
        for t in (torch.arange(N), masked)
    )
    assert torch.equal(one.loss, two.loss)


@BOTH
@pytest.mark.parametrize(
    "change,word",
    [
        ({"targets": torch.arange(N).int()}, "targets torch.int32"),
        ({"targets": torch.zeros(N, 1).long()}, "targets"),
        ({"hidden": torch.ones(N, H).long()}, "floating point"),
        ({"hidden": torch.ones(N, 1, H)}, "hidden"),
        ({"old_logprobs": torch.ones(N, device="meta")}, "old_logprobs is on meta"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_operands_of_the_wrong_kind(dtype, change, word):
    with pytest.raises(UserError, match=word):
        policy(dtype, **change)


@BOTH
def test_a_top_k_that_does_not_fit(dtype):
    with pytest.raises(UserError, match="both be"):
        distil(dtype, torch.zeros(N, 2).long(), torch.zeros(N, 3))
    with pytest.raises(UserError, match=f"vocabulary's {V}"):
        distil(dtype, torch.zeros(N, V + 1).long(), torch.zeros(N, V + 1))


def attention(dtype, tokens=6, **change):
    q, k, v = (torch.ones(tokens, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    operands = {"q": q, "k": k, "v": v, "chunk_size": 8, "local_size": 2}
    return ops.dual_chunk_attention(**(operands | change))


@BOTH
@pytest.mark.parametrize(
    "change,word",
    [
        ({"local_size": 8}, "local_size=8"),
        ({"clamp_at": 0}, "clamp_at=0"),
        ({"q_offset": 1}, "q_offset=1"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([1, 6])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([]).int()}, "cu_seqlens"),
        ({"q": torch.ones(6, 4, 8).half()}, "k .* as q is, torch.float16"),
        ({"v": torch.ones(6, 16)}, "v "),
        ({"inv_freq": torch.ones(8)}, "inv_freq"),
        ({"k_scale": torch.ones(5)}, "k_scale"),
    ],
)
def test_attention_operands(dtype, change, word):
    with pytest.raises(UserError, match=word):
        attention(dtype, **change)


@BOTH
def test_strides_do_not_matter(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, 20, 8, dtype=dtype).transpose(0, 1) for heads in (4, 2, 2))
    same = (x.contiguous() for x in (q, k, v))
    actual, expected = attention(dtype, q=q, k=k, v=v), attention(dtype, **dict(zip("qkv", same)))  # noqa: B905
    torch.testing.assert_close(actual, expected)
    hidden, weight = torch.randn(H, N, dtype=dtype).T, torch.randn(H, V, dtype=dtype).T
    actual = policy(dtype, hidden=hidden, weight=weight).loss
    expected = policy(dtype, hidden=hidden.contiguous(), weight=weight.contiguous()).loss
    torch.testing.assert_close(actual, expected)
