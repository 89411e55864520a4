"""Divergences against torch.distributions and explicit buckets, gradients by autograd, in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from q3mega import ops
from q3mega.errors import UserError
from q3mega.ops import vocab

KINDS = ("forward_kl", "reverse_kl", "jsd")


def operands(n=9, v=21, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    return (randn(n, 6), randn(v, 6)), {
        "teacher_hidden": randn(n, 8),
        "teacher_weight": randn(v, 8),
    }


def divergence(student, teacher, kind, beta):
    """Of (N, C) log-probabilities, (N,)."""
    q, p = (Categorical(logits=x) for x in (student, teacher))
    if kind == "forward_kl":
        return kl_divergence(p, q)
    if kind == "reverse_kl":
        return kl_divergence(q, p)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


def log_probs(hidden, weight, temperature, valid):
    return (hidden @ weight[:valid].T / temperature).log_softmax(-1)


def check(got, want, weights, inputs, atol=1e-9):
    torch.testing.assert_close(got.per_token, want.detach(), atol=atol, rtol=1e-8)
    total = (want * weights).sum()
    torch.testing.assert_close(got.loss, total, atol=atol, rtol=1e-8)
    ours, theirs = (torch.autograd.grad(x, inputs) for x in (got.loss, total))
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@given(
    n=st.integers(1, 12), v=st.integers(2, 30), padding=st.integers(0, 4),
    temperature=st.floats(0.5, 4.0), beta=st.floats(0.05, 0.95),
)  # fmt: skip
def test_the_whole_vocabulary(kind, n, v, padding, temperature, beta):
    inputs, teacher = operands(n, v + padding)
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = {"divergence": kind, "beta": beta, "temperature": temperature}
    got = ops.distill_loss(*inputs, **teacher, **settings, valid_vocab=v, loss_weights=weights)
    sides = [log_probs(*x, temperature, v) for x in (inputs, teacher.values())]
    check(
        got, divergence(sides[0], sides[1].detach(), kind, beta) * temperature**2, weights, inputs
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [True, False])
@given(n=st.integers(1, 8), k=st.integers(1, 12), temperature=st.floats(0.5, 3.0))
def test_the_teachers_best(kind, tail, n, k, temperature):
    inputs, teacher = operands(n)
    logp, ids = log_probs(*teacher.values(), temperature, None).detach().topk(k)
    got = ops.distill_loss(
        *inputs, teacher_topk=(ids, logp), divergence=kind, tail=tail, temperature=temperature
    )
    student = log_probs(*inputs, temperature, None)
    known = student.gather(1, ids)
    if tail:
        outside = torch.ones_like(student).scatter(1, ids, 0.0)
        known = torch.cat([known, (student.exp() * outside).sum(1, keepdim=True).log()], 1)
        tail = (1 - logp.exp().sum(1, keepdim=True)).clamp(min=1e-7)  # what fp32 can tell from 0
        logp = torch.cat([logp, tail.log()], 1)
    check(
        got, divergence(known, logp, kind, 0.5) * temperature**2, torch.ones(n), inputs, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_ids_known_is_the_whole_vocabulary(kind):
    inputs, teacher = operands()
    logp, ids = log_probs(*teacher.values(), 1.0, None).detach().sort(descending=True)
    full = ops.distill_loss(*inputs, **teacher, divergence=kind)
    for tail in (True, False):
        best = ops.distill_loss(*inputs, teacher_topk=(ids, logp), divergence=kind, tail=tail)
        torch.testing.assert_close(best.per_token, full.per_token, atol=1e-4, rtol=0)


def test_a_confident_students_tail_keeps_its_gradient():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[30.0], [0.0], [0.0]], requires_grad=True)  # 2e-13 outside the first id
    teacher = torch.tensor([[0]]), torch.tensor([[0.9]]).log()
    loss = ops.distill_loss(hidden, weight, teacher_topk=teacher, divergence="forward_kl").loss
    want = 0.9 * torch.tensor(0.9).log() + 0.1 * (torch.tensor(0.1 / 2).log() + 30)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(grad, torch.tensor([[0.1], [-0.05], [-0.05]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient_and_at_the_teacher_there_is_none(kind):
    inputs, teacher = operands()
    ops.distill_loss(*inputs, **teacher, divergence=kind).loss.backward()
    assert all(x.grad is None for x in teacher.values()) and inputs[0].grad.any()
    same = ops.distill_loss(
        *inputs, teacher_hidden=inputs[0], teacher_weight=inputs[1], divergence=kind
    )
    torch.testing.assert_close(same.loss, torch.zeros_like(same.loss))
    for grad in torch.autograd.grad(same.loss, inputs):
        torch.testing.assert_close(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("best", [False, True])
def test_slices_of_rows_change_nothing(monkeypatch, best):
    inputs, teacher = operands(17)
    if best:
        logp, ids = log_probs(*teacher.values(), 1.0, None).detach().topk(4)
        teacher = {"teacher_topk": (ids, logp)}
    at_once = ops.distill_loss(*inputs, **teacher)
    monkeypatch.setattr(vocab, "CPU_LOGITS_BYTES", 21 * 8 * 4)  # four rows
    sliced = ops.distill_loss(*inputs, **teacher)
    torch.testing.assert_close(sliced.per_token, at_once.per_token)
    ours, theirs = (torch.autograd.grad(x.loss, inputs) for x in (sliced, at_once))
    torch.testing.assert_close(ours, theirs)


def test_values_of_half_precision_are_fp32():
    inputs, teacher = operands()
    inputs = [x.detach().bfloat16() for x in inputs]
    teacher = {k: x.detach().bfloat16() for k, x in teacher.items()}
    out = ops.distill_loss(*inputs, **teacher)
    sides = [log_probs(a.double(), b.double(), 1.0, None) for a, b in (inputs, teacher.values())]
    assert out.per_token.dtype == torch.float32
    want = divergence(*sides, "reverse_kl", 0.5)
    torch.testing.assert_close(out.per_token.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    (hidden, weight), teacher = operands(0)
    out = ops.distill_loss(hidden, weight, **teacher, divergence=kind)
    assert out.loss == 0 and out.per_token.shape == (0,)
    out.loss.backward()


@pytest.mark.parametrize(
    "change,word",
    [
        ({"teacher_weight": None}, "teacher"),
        ({"teacher_topk": (torch.zeros(9, 1).long(), torch.zeros(9, 1))}, "teacher"),
        ({"divergence": "hellinger"}, "divergence='hellinger'"),
        ({"divergence": "jsd", "beta": 1.0}, "beta=1.0"),
        ({"teacher_weight": torch.zeros(20, 8)}, "teacher_weight has 20 rows"),
        ({"loss_weights": torch.ones(3)}, "loss_weights"),
    ],
)
def test_wrong_arguments_are_named(change, word):
    inputs, teacher = operands()
    with pytest.raises(UserError, match=word):
        ops.distill_loss(*inputs, **(teacher | change))
