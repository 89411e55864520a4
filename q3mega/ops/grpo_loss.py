"""The policy losses of GRPO's family, from hidden states.

The loss is the sum over tokens of loss_weights times a term. With the ratio r = exp(log p - old)
and the advantage A, the term of a variant is
  grpo, bnpo, dr_grpo, dapo   -min(r A, clip(r, 1 - low, 1 + high) A)      (2402.03300, 2503.14476)
  gspo                        the same with the sequence's ratio exp(mean log r)      (2507.18071)
  gspo_token                  the same value, gradient through each token's own log p
  cispo                       -sg(min(r, high)) A log p                            (2506.13585)
  sapo                        -(4 / tau) sigmoid(tau (r - 1)) A, tau 1, for A < 0 1.05 (2511.20347)
plus kl_coef times an estimate of the KL to a reference policy, minus entropy_coef times the
entropy. The first four variants differ in loss_weights alone, which the caller computes. Log ratios
are clamped to +-20.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from q3mega.errors import UserError
from q3mega.ops import vocab
from q3mega.ops.dispatch import register, resolve
from q3mega.ops.linear_logprob import linear_logprob

Variant = Literal["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gspo_token", "cispo", "sapo"]
Estimator = Literal["k1", "k2", "k3"]
MAX_LOG_RATIO = 20.0
SAPO_TAU = (1.0, 1.05)  # for advantages >= 0 and < 0


class GrpoOutput(NamedTuple):
    """What `grpo_loss` returns; all but the loss is detached.

    loss (): differentiable sum of the weighted per-token losses
    logprobs (N,): log p of the targets, 0 at tokens without weight
    entropy (N,), nats: 0 at tokens without weight
    clip_fraction (): share of the weighted tokens whose gradient a clip took away
    kl (N,), nats: the estimate, 0 at tokens without weight
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Settings:
    """The choice of loss.

    variant: see the module's text
    clip_low, clip_high: bounds of the ratio around 1; for cispo clip_high is the cap itself
    kl_coef: factor of the KL to the reference policy
    entropy_coef: factor of the entropy bonus

    No recipe sets the rest, which is for programs that call the operator themselves:

    kl_estimator: Schulman's k1, k2 or k3
    clip_ratio_c: upper bound of the ratio where A < 0 (dual clip, 1912.09729)
    tis_cap: the policy term is multiplied by min(exp(old - rollout), tis_cap)
    """

    variant: Variant = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    kl_estimator: Estimator = "k3"
    clip_ratio_c: float | None = None
    tis_cap: float | None = None


class Rows(NamedTuple):
    """One number a token, (N,) fp32 each."""

    advantages: Tensor
    old_logprobs: Tensor
    loss_weights: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None


class Sequences(NamedTuple):
    """ids (N,) int64: the sequence of each token. cp_group: ranks that share the sequences."""

    ids: Tensor
    cp_group: dist.ProcessGroup | None


class TokenTerms(NamedTuple):
    """Per weighted token (n,), before the weights.

    loss: the token's loss
    g_logprob: the loss's derivative by log p, without the entropy's
    clipped: whether a clip took gradient away
    kl: the KL estimate
    """

    loss: Tensor
    g_logprob: Tensor
    clipped: Tensor
    kl: Tensor


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor,
    loss_weights: Tensor,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    variant: Variant = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Estimator = "k3",
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
    temperature: float = 1.0,
    seq_ids: Tensor | None = None,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    cp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> GrpoOutput:
    """Sum of per-token policy losses times loss_weights: see the module's text.

    hidden (N, H): hidden states before the lm_head
    weight (V, H): the lm_head, or with tp_group this rank's equal shard of its rows
    targets (N,) int64: sampled token ids; anything where loss_weights is 0
    advantages, old_logprobs, loss_weights (N,) fp32
    ref_logprobs (N,) fp32: log p under the reference policy, needed with kl_coef
    variant, clip_low, clip_high, kl_coef, entropy_coef: see `Settings`
    temperature: divides the logits
    seq_ids (N,) int64 from 0: needed by gspo and gspo_token, whose means run over the tokens of
        non-zero weight; with cp_group over those on all its ranks, which know the same sequences
    valid_vocab: ids from here on are padding rows of the lm_head and have no mass
    backend: see `q3mega.ops.dispatch`

    Four options no recipe reaches; they are for programs that call the operator themselves:
    rollout_logprobs (N,) fp32 (log p under the sampler), tis_cap, clip_ratio_c, kl_estimator.

    Raises UserError for an unknown choice, a missing argument or shapes that do not fit.
    """
    vocab.check(
        hidden, weight, temperature, targets=targets, advantages=advantages,
        old_logprobs=old_logprobs, loss_weights=loss_weights, ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs, seq_ids=seq_ids,
    )  # fmt: skip
    rows = Rows(advantages, old_logprobs, loss_weights, ref_logprobs, rollout_logprobs)
    settings = Settings(
        variant, clip_low, clip_high, kl_coef, entropy_coef, kl_estimator, clip_ratio_c, tis_cap
    )
    _check(settings, rows, seq_ids)
    targets = torch.where(loss_weights != 0, targets, 0)  # without weight it may be anything
    sequences = None if seq_ids is None else Sequences(seq_ids, cp_group)
    output: GrpoOutput = resolve("grpo_loss", backend, hidden)(
        hidden, weight, targets, rows, settings, temperature, sequences, valid_vocab, tp_group
    )
    return output


def _check(settings: Settings, rows: Rows, seq_ids: Tensor | None) -> None:
    """Raise UserError for an unknown choice, or one whose argument is missing."""
    variant, estimator = settings.variant, settings.kl_estimator
    if variant not in get_args(Variant):
        raise UserError(f"variant={variant!r}: choose one of {', '.join(get_args(Variant))}")
    if estimator not in get_args(Estimator):
        raise UserError(f"kl_estimator={estimator!r}: choose one of k1, k2, k3")
    if variant.startswith("gspo") and seq_ids is None:
        raise UserError(f"variant={variant!r} averages over sequences: give seq_ids")
    if settings.tis_cap is not None and rows.rollout_logprobs is None:
        raise UserError(
            f"tis_cap={settings.tis_cap} corrects for the sampler: give rollout_logprobs"
        )
    if settings.kl_coef and rows.ref_logprobs is None:
        raise UserError(
            f"kl_coef={settings.kl_coef} pulls to a reference policy: give ref_logprobs"
        )


def composed(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Rows,
    settings: Settings,
    temperature: float,
    sequences: Sequences | None,
    valid_vocab: int | None,
    group: dist.ProcessGroup | None,
    backend: str,
) -> GrpoOutput:
    """The definition: the loss in plain PyTorch, on `backend`'s log-probabilities."""
    logp, entropy = linear_logprob(
        hidden, weight, targets, temperature=temperature, valid_vocab=valid_vocab,
        tp_group=group, backend=backend,
    )  # fmt: skip
    advantages, old, weights, ref, rollout = rows
    active = weights != 0

    def zero_inactive(x: Tensor) -> Tensor:
        """0 at tokens without weight: what stands there is arbitrary, and 0 * NaN is NaN."""
        return torch.where(active, x, 0.0)

    advantages, log_ratio = zero_inactive(advantages), zero_inactive(logp - old)
    if sequences is not None and settings.variant.startswith("gspo"):
        mean = _sequence_mean(log_ratio, sequences, active)
        log_ratio = mean if settings.variant == "gspo" else mean.detach() + logp - logp.detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss, clipped = _policy_loss(settings, ratio, logp, advantages)
    if settings.tis_cap is not None and rollout is not None:
        loss = loss * zero_inactive(old - rollout).exp().clamp(max=settings.tis_cap)
    if ref is None:
        kl = torch.zeros_like(logp)
    else:
        kl = _kl(zero_inactive(ref - logp), settings.kl_estimator)
    if settings.kl_coef:
        loss = loss + settings.kl_coef * kl
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    clip_fraction = (clipped & active).sum() / active.sum().clamp(min=1)
    return GrpoOutput(
        (loss * weights).sum(),
        zero_inactive(logp).detach(),
        zero_inactive(entropy).detach(),
        clip_fraction,
        kl.detach(),
    )


register("grpo_loss", "reference")(partial(composed, backend="reference"))


def token_terms(logp: Tensor, entropy: Tensor, rows: Rows, settings: Settings) -> TokenTerms:
    """The loss of weighted tokens (n,), with its derivative in closed form.

    For every variant whose ratio is the token's own, so not for gspo's.
    """
    advantages, old, _, ref, rollout = rows
    log_ratio = logp - old
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss, clipped = _policy_loss(settings, ratio, logp, advantages)
    if settings.variant == "cispo":
        g = -ratio.clamp(max=settings.clip_high) * advantages
    else:
        g = -ratio * advantages * (log_ratio.abs() <= MAX_LOG_RATIO)
        if settings.variant == "sapo":
            tau = torch.where(advantages < 0, SAPO_TAU[1], SAPO_TAU[0])
            gate = torch.sigmoid(tau * (ratio - 1))
            g = 4 * gate * (1 - gate) * g
        else:
            g = g.masked_fill(clipped, 0.0)
    if settings.tis_cap is not None and rollout is not None:
        importance_weight = (old - rollout).exp().clamp(max=settings.tis_cap)
        loss, g = loss * importance_weight, g * importance_weight
    kl = torch.zeros_like(logp)
    if ref is not None:
        d = ref - logp
        kl = _kl(d, settings.kl_estimator)
        g_kl = _kl_derivative(d, settings.kl_estimator)
        loss, g = loss + settings.kl_coef * kl, g + settings.kl_coef * g_kl
    return TokenTerms(loss - settings.entropy_coef * entropy, g, clipped, kl)


def _policy_loss(
    settings: Settings, ratio: Tensor, logp: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """Per-token policy loss, and whether a clip took gradient away (all of it, but for cispo)."""
    low, high, dual_clip = settings.clip_low, settings.clip_high, settings.clip_ratio_c
    if settings.variant == "cispo":
        return -ratio.detach().clamp(max=high) * a * logp, (ratio > high) & (a != 0)
    if settings.variant == "sapo":
        tau = torch.where(a < 0, a.new_tensor(SAPO_TAU[1]), SAPO_TAU[0])
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * a, torch.zeros_like(a).bool()
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    clipped = ((a > 0) & (ratio > 1 + high)) | ((a < 0) & (ratio < 1 - low))
    if dual_clip is not None:
        capped = (a < 0) & (ratio > dual_clip)
        loss = torch.where(capped, -dual_clip * a, loss)
        clipped = clipped | capped
    return loss, clipped


def _kl(d: Tensor, estimator: Estimator) -> Tensor:
    """Schulman's estimates of KL(policy || reference) from d = log reference - log policy.

    http://joschu.net/blog/kl-approx.html
    """
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return d.exp() - d - 1


def _kl_derivative(d: Tensor, estimator: Estimator) -> Tensor:
    """The derivative of `_kl` by log policy."""
    if estimator == "k1":
        return torch.ones_like(d)
    if estimator == "k2":
        return -d
    return (1 - d.exp()) * (d.abs() <= MAX_LOG_RATIO)


def _sequence_mean(x: Tensor, sequences: Sequences, mask: Tensor) -> Tensor:
    """(N,): for every token the mean of x over its sequence's masked tokens.

    x (N,) is 0 outside the mask.
    """
    ids, group = sequences
    n = int(ids.max()) + 1 if len(ids) else 0
    sums = x.new_zeros(n).index_add(0, ids, x)
    counts = x.new_zeros(n).index_add(0, ids, mask.to(x.dtype))
    sums, counts = (
        vocab.copy_to_tp_region(vocab.reduce_from_tp_region(v, group), group)
        for v in (sums, counts)
    )
    return (sums / counts.clamp(min=1))[ids]
