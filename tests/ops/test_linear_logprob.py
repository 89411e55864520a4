"""Values and gradients against autograd through the whole matrix of logits."""

import pytest
import torch
from torch import Tensor

from q3mega import ops
from q3mega.errors import UserError
from q3mega.ops import vocab


def make(n: int, v: int, h: int = 6, dtype: torch.dtype = torch.float64, spread: float = 2.0):
    torch.manual_seed(n + v)
    hidden = torch.randn(n, h, dtype=dtype, requires_grad=True)
    weight = (spread * torch.randn(v, h, dtype=dtype)).requires_grad_()
    return hidden, weight, torch.randint(v, (n,))


def naive(hidden: Tensor, weight: Tensor, y: Tensor, temperature: float = 1.0, valid=None):
    logp = (hidden @ weight[:valid].T / temperature).log_softmax(-1)
    return logp[torch.arange(len(y)), y], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize(("n", "v"), [(1, 1), (1, 7), (13, 31), (40, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_matches_naive(n, v, temperature, rows, monkeypatch) -> None:
    monkeypatch.setattr(vocab, "CPU_LOGITS_BYTES", rows * v * 8)
    hidden, weight, y = make(n, v)
    ours = ops.linear_logprob(hidden, weight, y, temperature=temperature)
    theirs = naive(hidden, weight, y, temperature)
    torch.testing.assert_close(ours, theirs)
    a, b = torch.randn(2, n, dtype=torch.float64)
    a[::3] = 0.0  # rows without gradient are skipped
    b[::3] = 0.0
    for mix in (lambda lp, e: (a * lp + b * e).sum(), lambda lp, e: (a * lp).sum()):
        grads = torch.autograd.grad(mix(*ours), (hidden, weight), retain_graph=True)
        expected = torch.autograd.grad(mix(*theirs), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(grads, expected)
    only = torch.autograd.grad((b * ours[1]).sum(), weight, retain_graph=True)
    torch.testing.assert_close(only, torch.autograd.grad((b * theirs[1]).sum(), weight))


def test_padding_rows_have_no_mass_and_no_gradient() -> None:
    hidden, weight, y = make(9, 20)
    y = y % 15
    ours = ops.linear_logprob(hidden, weight, y, valid_vocab=15)
    theirs = naive(hidden, weight, y, valid=15)
    torch.testing.assert_close(ours, theirs)
    grads = torch.autograd.grad(sum(o.sum() for o in ours), (hidden, weight))
    torch.testing.assert_close(
        grads, torch.autograd.grad(sum(t.sum() for t in theirs), (hidden, weight))
    )
    assert not grads[1][15:].any()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[100.0], [-100.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[9.0], [-9.0], [0.0]], requires_grad=True)
    logprob, entropy = ops.linear_logprob(hidden, weight, torch.tensor([0, 0, 1]))
    assert logprob.tolist() == pytest.approx([0.0, -1800.0, -1.0986123])
    assert entropy.tolist() == pytest.approx([0.0, 0.0, 1.0986123])
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype) -> None:
    hidden, weight, y = make(64, 500, 32, dtype, spread=1.0)
    exact = naive(hidden.double(), weight.double(), y)
    plain = naive(hidden, weight, y)
    ours = ops.linear_logprob(hidden, weight, y)
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert o.dtype == torch.float32
        assert (o - e).norm() <= 2 * (p - e).norm()
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(sum(x.sum() for x in naive(*leaves, y)), leaves)
    plain = torch.autograd.grad(sum(x.sum() for x in plain), (hidden, weight))
    ours = torch.autograd.grad(sum(x.sum() for x in ours), (hidden, weight))
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert o.dtype == dtype
        assert (o - e).norm() <= 2 * (p - e).norm()


def test_gradcheck() -> None:
    hidden, weight, y = make(3, 5)
    torch.autograd.gradcheck(
        lambda h, w: ops.linear_logprob(h, w, y, temperature=0.7, valid_vocab=5), (hidden, weight)
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_gets_no_gradient(frozen: int) -> None:
    *pair, y = make(6, 8)
    expected = torch.autograd.grad(sum(x.sum() for x in naive(*pair, y)), pair[1 - frozen])[0]
    pair[frozen].requires_grad_(False)
    sum(x.sum() for x in ops.linear_logprob(*pair, y)).backward()
    assert pair[frozen].grad is None
    torch.testing.assert_close(pair[1 - frozen].grad, expected)


def test_no_tokens() -> None:
    hidden, weight, y = make(0, 5)
    logprob, entropy = ops.linear_logprob(hidden, weight, y)
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == entropy.shape == (0,)
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_bad_arguments_are_refused() -> None:
    hidden, weight, y = make(4, 5)
    with pytest.raises(UserError, match="temperature=0"):
        ops.linear_logprob(hidden, weight, y, temperature=0.0)
    with pytest.raises(UserError, match="weight"):
        ops.linear_logprob(hidden, weight[:, 1:], y)
    with pytest.raises(UserError, match="targets"):
        ops.linear_logprob(hidden, weight, y[1:])
