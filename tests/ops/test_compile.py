"""Each operator is one node of a graph that torch.compile captures whole."""

import pytest
import torch

from q3mega import ops

N, V, H = 6, 19, 4


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def logprob(hidden, weight, targets):
    actual, entropy = ops.linear_logprob(hidden, weight, targets)
    return (actual + 0.1 * entropy).sum()


def grpo(hidden, weight, targets):
    row = torch.ones(N)
    return ops.grpo_loss(
        hidden, weight, targets, advantages=row, old_logprobs=-3 * row, loss_weights=row / N
    ).loss


def distill(hidden, weight, targets):
    return ops.distill_loss(
        hidden, weight, teacher_hidden=hidden.detach() + 1, teacher_weight=weight.detach()
    ).loss


def topk(hidden, weight, targets):
    ids = torch.arange(3).expand(N, 3)
    return ops.distill_loss(hidden, weight, teacher_topk=(ids, torch.full((N, 3), -2.0))).loss


def attention(hidden, weight, targets):
    q, k = hidden[:, None], weight[:N, None]
    return ops.dual_chunk_attention(q, k, k, chunk_size=4, local_size=1).square().sum()


@pytest.mark.parametrize("fn", [logprob, grpo, distill, topk, attention])
def test_captured_whole(fn) -> None:
    hidden, weight, targets = operands()
    actual = []
    for run in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
        loss = run(hidden, weight, targets)
        actual.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    for plain, captured in zip(*actual, strict=True):
        torch.testing.assert_close(captured, plain)
