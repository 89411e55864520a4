"""torch.autocast around an operator changes nothing: it knows itself which of its sums are fp32."""

from functools import partial

import pytest
import torch
from torch import Tensor

from q3mega import ops

N, H, V, K = 12, 16, 40, 5


def logprob(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> Tensor:
    actual, entropy = ops.linear_logprob(hidden, weight, targets, backend=backend)
    return (actual + 0.1 * entropy).sum()


def policy(variant, hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> Tensor:
    one = torch.ones(N)
    return ops.grpo_loss(
        hidden, weight, targets, advantages=one, old_logprobs=-3 * one, loss_weights=one,
        entropy_coef=0.1, variant=variant, seq_ids=torch.arange(N) // 4, backend=backend,
    ).loss  # fmt: skip


def distill(teacher, hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> Tensor:
    return ops.distill_loss(hidden, weight, **teacher, backend=backend).loss


EXACT = {"teacher_hidden": torch.ones(N, H), "teacher_weight": torch.eye(V, H)}
BEST = {"teacher_topk": (torch.arange(K).repeat(N, 1), torch.full((N, K), -2.0))}
LOSSES = {
    "linear_logprob": logprob,
    "grpo": partial(policy, "grpo"),
    "gspo": partial(policy, "gspo"),
    "whole teacher": partial(distill, EXACT),
    "best of the teacher": partial(distill, BEST),
    "best alone": partial(distill, BEST | {"tail": False}),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_a_loss_is_the_same(name: str, backend: str) -> None:
    actual = []
    for enabled in (False, True):
        random = torch.Generator().manual_seed(1)
        leaves = [torch.randn(n, H, generator=random, requires_grad=True) for n in (N, V)]
        targets = torch.randint(V, (N,), generator=random)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = LOSSES[name](*leaves, targets, backend)
            if name in ("linear_logprob", "gspo"):  # whose gradients come from a pass of their own
                loss.backward()
        if leaves[0].grad is None:
            loss.backward()
        actual.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *actual))


def test_attention_is_the_same_too() -> None:
    q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    attend = partial(ops.dual_chunk_attention, q, k, k, chunk_size=4, local_size=1)
    expected = attend()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(), expected)
