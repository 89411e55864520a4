"""The policy losses of GRPO's family, from hidden states.

With ratio r = exp(logp - old), advantage A and weight w a token, the loss is the sum of w times
  grpo, bnpo, dr_grpo, dapo   -min(r A, clip(r, 1 - low, 1 + high) A)      (2402.03300, 2503.14476)
  gspo                        the same with the sequence's ratio exp(mean log r)      (2507.18071)
  gspo_token                  the same value, gradient through each token's own log p
  cispo                       -sg(min(r, high)) A log p                            (2506.13585)
  sapo                        -(4 / tau) sigmoid(tau (r - 1)) A, tau 1, for A < 0 1.05 (2511.20347)
plus kl_coef times a KL estimate to a reference, minus entropy_coef times the entropy. The first
four differ in the weights alone, which are the caller's. Log ratios are held within +-20.
"""

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
SAPO_TAU = (1.0, 1.05)


class GrpoOutput(NamedTuple):
    """loss: differentiable sum. The rest is detached: logprobs, entropy, kl (N,), 0 at tokens
    without weight, and the share of weighted tokens whose policy gradient was clipped away.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    clip_fraction: Tensor
    kl: Tensor


class Rows(NamedTuple):
    """What stands beside each token, (N,) each."""

    advantages: Tensor
    old: Tensor
    weights: Tensor
    ref: Tensor | None
    rollout: Tensor | None


class Sequences(NamedTuple):
    """Which sequence each token belongs to (N,), and the ranks over which sequences are cut."""

    ids: Tensor
    cp_group: dist.ProcessGroup | None


class Settings(NamedTuple):
    """The choice of loss: what every backend takes as it is."""

    variant: Variant
    clip: tuple[float, float]
    dual_clip: float | None
    kl_coef: float
    kl_estimator: Estimator
    entropy_coef: float
    tis_cap: float | None


class TokenTerms(NamedTuple):
    """Per token, before the weights: loss, its derivative by log p, was it clipped, KL estimate."""

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
    """Sum of per-token policy losses times loss_weights, see the module's text.

    hidden (N, H), weight (V, H) or the rank's shard, targets (N,) int64; advantages, old_logprobs,
    loss_weights, ref_logprobs, rollout_logprobs (N,) fp32. clip_high is cispo's cap itself.
    clip_ratio_c: for A < 0 the ratio is capped there (dual clip). tis_cap: truncated importance
    weight min(exp(old - rollout), tis_cap) on the policy term. seq_ids (N,) int64 from 0, needed by
    gspo and gspo_token, whose means run over the tokens of non-zero weight; with cp_group, over
    those on all its ranks, which know the same sequences. Raises UserError for an unknown choice,
    a missing argument or shapes that do not fit.
    """
    vocab.check(
        hidden, weight, temperature, targets=targets, advantages=advantages,
        old_logprobs=old_logprobs, loss_weights=loss_weights, ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs, seq_ids=seq_ids,
    )  # fmt: skip
    if variant not in get_args(Variant):
        raise UserError(f"variant={variant!r}: choose one of {', '.join(get_args(Variant))}")
    if kl_estimator not in get_args(Estimator):
        raise UserError(f"kl_estimator={kl_estimator!r}: choose one of k1, k2, k3")
    if variant.startswith("gspo") and seq_ids is None:
        raise UserError(f"variant={variant!r} averages over sequences: give seq_ids")
    if tis_cap is not None and rollout_logprobs is None:
        raise UserError(f"tis_cap={tis_cap} corrects for the sampler: give rollout_logprobs")
    if kl_coef and ref_logprobs is None:
        raise UserError(f"kl_coef={kl_coef} pulls to a reference policy: give ref_logprobs")
    targets = torch.where(loss_weights != 0, targets, 0)  # without weight it may be anything
    rows = Rows(advantages, old_logprobs, loss_weights, ref_logprobs, rollout_logprobs)
    clip = clip_low, clip_high
    settings = Settings(variant, clip, clip_ratio_c, kl_coef, kl_estimator, entropy_coef, tis_cap)
    sequences = None if seq_ids is None else Sequences(seq_ids, cp_group)
    return resolve("grpo_loss", backend, hidden)(
        hidden, weight, targets, rows, settings, temperature, sequences, valid_vocab, tp_group
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
    """The loss in plain PyTorch on `backend`'s log-probabilities: its definition."""
    logp, entropy = linear_logprob(
        hidden, weight, targets, temperature=temperature, valid_vocab=valid_vocab,
        tp_group=group, backend=backend,
    )  # fmt: skip
    variant, clip, dual_clip, kl_coef, kl_estimator, entropy_coef, tis_cap = settings
    advantages, old, w, ref, rollout = rows
    active = w != 0

    def known(x: Tensor) -> Tensor:
        """0 at tokens without weight: what stands there is arbitrary, and 0 * NaN is NaN."""
        return torch.where(active, x, 0.0)

    advantages, log_ratio = known(advantages), known(logp - old)
    if sequences is not None and variant.startswith("gspo"):
        mean = _sequence_mean(log_ratio, sequences, active)
        log_ratio = mean if variant == "gspo" else mean.detach() + logp - logp.detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss, clipped = _policy(variant, ratio, logp, advantages, clip, dual_clip)
    if tis_cap is not None and rollout is not None:
        loss = loss * known(old - rollout).exp().clamp(max=tis_cap)
    kl = torch.zeros_like(logp) if ref is None else _kl(known(ref - logp), kl_estimator)
    if kl_coef:
        loss = loss + kl_coef * kl
    if entropy_coef:
        loss = loss - entropy_coef * entropy
    share = (clipped & active).sum() / active.sum().clamp(min=1)
    total = (loss * w).sum()
    return GrpoOutput(total, known(logp).detach(), known(entropy).detach(), share, kl.detach())


register("grpo_loss", "reference")(partial(composed, backend="reference"))


def token_terms(
    logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    old: Tensor,
    ref: Tensor | None,
    rollout: Tensor | None,
    settings: Settings,
) -> TokenTerms:
    """The same for weighted tokens, with the derivative in closed form.

    For every variant whose ratio is the token's own, so not for gspo's.
    """
    variant, (low, high), dual_clip, kl_coef, estimator, entropy_coef, tis_cap = settings
    log_ratio = logp - old
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss, clipped = _policy(variant, ratio, logp, advantages, (low, high), dual_clip)
    if variant == "cispo":
        g = -ratio.clamp(max=high) * advantages
    else:
        g = -ratio * advantages * (log_ratio.abs() <= MAX_LOG_RATIO)
        if variant == "sapo":
            tau = torch.where(advantages < 0, SAPO_TAU[1], SAPO_TAU[0])
            share = torch.sigmoid(tau * (ratio - 1))
            g = 4 * share * (1 - share) * g
        else:
            g = g.masked_fill(clipped, 0.0)
    if tis_cap is not None and rollout is not None:
        trust = (old - rollout).exp().clamp(max=tis_cap)
        loss, g = loss * trust, g * trust
    kl = torch.zeros_like(logp)
    if ref is not None:
        d = ref - logp
        kl = _kl(d, estimator)
        if estimator == "k1":
            slope = torch.ones_like(d)
        elif estimator == "k2":
            slope = -d
        else:
            slope = (1 - d.exp()) * (d.abs() <= MAX_LOG_RATIO)
        loss, g = loss + kl_coef * kl, g + kl_coef * slope
    return TokenTerms(loss - entropy_coef * entropy, g, clipped, kl)


def _policy(
    variant: Variant,
    ratio: Tensor,
    logp: Tensor,
    a: Tensor,
    clip: tuple[float, float],
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Per-token policy loss, and where a clip took gradient away (all of it, but for cispo)."""
    low, high = clip
    if variant == "cispo":
        return -ratio.detach().clamp(max=high) * a * logp, (ratio > high) & (a != 0)
    if variant == "sapo":
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


def _sequence_mean(x: Tensor, sequences: Sequences, mask: Tensor) -> Tensor:
    """Every token gets the mean of x, zero outside the mask, over its sequence's masked tokens."""
    ids, group = sequences
    n = int(ids.max()) + 1 if len(ids) else 0
    total = x.new_zeros(n).index_add(0, ids, x)
    count = x.new_zeros(n).index_add(0, ids, mask.to(x.dtype))
    total, count = (
        vocab.copy_to_tp_region(vocab.reduce_from_tp_region(v, group), group)
        for v in (total, count)
    )
    return (total / count.clamp(min=1))[ids]
