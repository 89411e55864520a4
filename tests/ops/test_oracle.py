"""The losses against those of Liger-Kernel and TRL: code that is not ours, on the same operands."""

from types import SimpleNamespace

import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from q3mega import ops

B, T, H, V = 4, 7, 12, 40  # sequences, tokens each, width, vocabulary


@pytest.fixture
def batch() -> SimpleNamespace:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B * T, H, generator=g).requires_grad_()
    weight = torch.randn(V, H, generator=g).requires_grad_()
    targets = torch.randint(V, (B * T,), generator=g)
    with torch.no_grad():
        logp = ops.linear_logprob(hidden, weight, targets, temperature=0.8)[0]
    lengths = torch.tensor([7, 4, 5, 1])
    return SimpleNamespace(
        hidden=hidden,
        weight=weight,
        targets=targets,
        mask=(torch.arange(T) < lengths[:, None]).float(),
        advantages=torch.tensor([1.0, -0.7, 0.0, 1.3]),
        old=logp + 0.4 * torch.randn(B * T, generator=g),
        ref=logp + 0.3 * torch.randn(B * T, generator=g),
        rollout=logp + 0.3 * torch.randn(B * T, generator=g),
    )


def gradients(loss: torch.Tensor, batch: SimpleNamespace) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, (batch.hidden, batch.weight))]


def weights(aggregate: str, mask: torch.Tensor) -> torch.Tensor:
    if aggregate == "sequence":
        return mask / mask.sum(1, keepdim=True) / B
    return mask / (mask.sum() if aggregate == "token" else B * 16)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize(
    "variant,aggregate,dual_clip",
    [
        ("grpo", "sequence", None),
        ("grpo", "sequence", 1.5),
        ("bnpo", "token", None),
        ("dapo", "token", 1.5),
        ("dr_grpo", "constant", None),
        ("cispo", "token", None),
        ("sapo", "sequence", None),
        ("gspo", "sequence", None),
        ("gspo", "sequence", 1.5),
    ],
)
def test_grpo_family(batch, variant, aggregate, dual_clip, kl_coef):
    high = 1.3 if variant == "cispo" else 0.28
    cap = None if variant == "gspo" else 1.2
    theirs = LigerFusedLinearGRPOLoss(
        beta=kl_coef, compiled=False, use_ref_model=True, epsilon_low=0.2, epsilon_high=high,
        loss_type="grpo" if variant == "gspo" else variant, max_completion_length=16,
        importance_sampling_level="sequence" if variant == "gspo" else "token",
        temperature=0.8, delta=dual_clip,
    )  # fmt: skip
    trust = None if cap is None else (batch.old - batch.rollout).exp().clamp(max=cap).view(B, T)
    expected = theirs(
        batch.hidden.view(B, T, H), batch.weight, batch.targets.view(B, T), batch.mask,
        batch.advantages, ref_per_token_logps=batch.ref.view(B, T),
        old_per_token_logps=batch.old.view(B, T), vllm_is_ratio=trust,
    )[0]  # fmt: skip
    actual = ops.grpo_loss(
        batch.hidden, batch.weight, batch.targets,
        advantages=batch.advantages.repeat_interleave(T), old_logprobs=batch.old,
        loss_weights=weights(aggregate, batch.mask).flatten(), ref_logprobs=batch.ref,
        rollout_logprobs=batch.rollout, variant=variant, clip_low=0.2, clip_high=high,
        clip_ratio_c=dual_clip, kl_coef=kl_coef, tis_cap=cap, temperature=0.8,
        seq_ids=torch.arange(B).repeat_interleave(T),
    ).loss  # fmt: skip
    for ours, other in zip(gradients(actual, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_log_probability_and_entropy_of_trl(batch):
    expected = ChunkedLogProbFunction.apply(
        batch.hidden, batch.weight, None, batch.targets, 0.8, 16, None, 1.0, ("entropy",)
    )[:2]
    actual = ops.linear_logprob(batch.hidden, batch.weight, batch.targets, temperature=0.8)
    pull = torch.randn(2, B * T, generator=torch.Generator().manual_seed(1))
    ours, theirs = (gradients((torch.stack(x) * pull).sum(), batch) for x in (actual, expected))
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=1e-4, atol=1e-6)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)  # theirs subtracts large sums


DIVERGENCES = [("jsd", 0.5), ("jsd", 0.2), ("forward_kl", 0.0), ("reverse_kl", 1.0)]


@pytest.mark.parametrize("divergence,beta", DIVERGENCES)
def test_divergences_of_trl(batch, divergence, beta):
    g = torch.Generator().manual_seed(1)
    teacher, head = torch.randn(B * T, H, generator=g), torch.randn(V, H, generator=g)
    theirs, _ = ChunkedDivergenceFunction.apply(
        batch.hidden, batch.weight, None, teacher, head, None, beta, 2.0
    )
    actual = ops.distill_loss(
        batch.hidden, batch.weight, teacher_hidden=teacher, teacher_weight=head,
        divergence=divergence, beta=beta or 0.5, temperature=2.0,
        loss_weights=batch.mask.flatten(),
    )  # fmt: skip
    expected = 2.0**2 * (theirs * batch.mask.flatten()).sum()  # theirs: without T squared
    for x, y in zip(gradients(actual.loss, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence,beta", DIVERGENCES)
def test_divergences_of_liger(batch, divergence, beta):
    g = torch.Generator().manual_seed(1)
    teacher, head = torch.randn(B * T, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.where(batch.mask.flatten() > 0, batch.targets, -100)
    theirs = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=2.0, compiled=False
    )
    expected = theirs(batch.hidden, batch.weight, teacher, head, labels)
    actual = ops.distill_loss(
        batch.hidden, batch.weight, teacher_hidden=teacher, teacher_weight=head,
        divergence=divergence, beta=beta or 0.5, temperature=2.0,
        loss_weights=batch.mask.flatten(),
    ).loss  # fmt: skip
    scale = 2.0**2 * batch.mask.sum()  # theirs: the mean over tokens, without temperature squared
    for ours, other in zip(gradients(actual, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(ours, other * scale, rtol=1e-4, atol=1e-6)
