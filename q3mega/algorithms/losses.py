"""The losses of the recipe, each from hidden states through one operator.

All are sums: `normalise` puts mask and normaliser into the samples' weights beforehand.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from q3mega import ops
from q3mega.data.batch import Batch, Sample
from q3mega.engine import LMHead, LossFn
from q3mega.ops.distill_loss import Divergence
from q3mega.ops.grpo_loss import Settings as GrpoSettings


def normalise(samples: Sequence[Sample], aggregate: str = "token", length: int = 1) -> list[Sample]:
    """Scale weights so that the global sum is the wanted mean.

    "token": mean over all weighted tokens (SFT, DAPO, CISPO). "sequence": mean over sequences of
    each one's token mean (GRPO, GSPO). "constant": tokens over len(samples) * length (Dr. GRPO).
    """
    total = sum(sum(s.weights) for s in samples) or 1.0
    out = []
    for s in samples:
        if aggregate == "token":
            scale = 1.0 / total
        elif aggregate == "sequence":
            scale = 1.0 / (len(samples) * (sum(s.weights) or 1.0))
        else:
            scale = 1.0 / (len(samples) * length)
        out.append(Sample(s.tokens, [w * scale for w in s.weights], s.columns))
    return out


def _weighted(values: Tensor, batch: Batch) -> Tensor:
    return (values.detach() * batch.loss_weights).sum()


def supervised(head: LMHead, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the weighted tokens; `entropy` is their mean (token aggregate)."""
    logprob, entropy = ops.linear_logprob(
        head.hidden,
        head.weight,
        batch.targets,
        valid_vocab=head.valid_vocab,
        tp_group=head.tp_group,
    )
    return -(logprob * batch.loss_weights).sum(), {"entropy": _weighted(entropy, batch)}


def policy_gradient(settings: GrpoSettings, temperature: float = 1.0) -> LossFn:
    """A loss of GRPO's family, see `ops.grpo_loss`."""

    def loss(head: LMHead, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        columns = batch.columns
        out = ops.grpo_loss(
            head.hidden,
            head.weight,
            batch.targets,
            advantages=columns["advantages"],
            old_logprobs=columns["old_logprobs"],
            ref_logprobs=columns.get("ref_logprobs"),
            loss_weights=batch.loss_weights,
            seq_ids=batch.seq_ids,
            valid_vocab=head.valid_vocab,
            tp_group=head.tp_group,
            cp_group=head.cp_group,
            variant=settings.variant,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            kl_coef=settings.kl_coef,
            entropy_coef=settings.entropy_coef,
            temperature=temperature,
        )
        active = batch.loss_weights > 0
        mismatch = (out.logprobs - columns["old_logprobs"]).abs()

        def total(values: Tensor) -> Tensor:
            return torch.where(active, values, 0.0).sum()  # 0 * NaN is NaN

        return out.loss, {
            "entropy": total(out.entropy),
            "kl": total(out.kl),
            "clip_fraction": out.clip_fraction * active.sum(),
            # on the first update of a rollout batch: trainer against sampler
            "logprob_mismatch": total(mismatch),
            "active": active.sum(),
        }

    return loss


def distillation(
    teacher_weight: Tensor, divergence: Divergence, temperature: float = 1.0
) -> LossFn:
    """Exact full-vocabulary divergence to the teacher, whose hidden states travel in the batch."""

    def teacher(batch: Batch) -> dict[str, Any]:
        hidden = batch.columns["teacher_hidden"]
        return {"teacher_hidden": hidden, "teacher_weight": teacher_weight}

    return _divergence(teacher, divergence, temperature)


def distillation_topk(divergence: Divergence, temperature: float = 1.0) -> LossFn:
    """Divergence to the teacher's K best tokens, and all others as one, which travel in the batch.

    Columns teacher_ids and teacher_logprobs (T, K); an id below 2^24 is exact in fp32.
    """

    def teacher(batch: Batch) -> dict[str, Any]:
        ids, logprobs = batch.columns["teacher_ids"], batch.columns["teacher_logprobs"]
        return {"teacher_topk": (ids.long(), logprobs)}

    return _divergence(teacher, divergence, temperature)


def _divergence(
    teacher: Callable[[Batch], dict[str, Any]], divergence: Divergence, temperature: float
) -> LossFn:
    """teacher(batch): that of `ops.distill_loss`, in whichever form."""

    def loss(head: LMHead, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        out = ops.distill_loss(
            head.hidden,
            head.weight,
            **teacher(batch),
            divergence=divergence,
            temperature=temperature,
            loss_weights=batch.loss_weights,
            valid_vocab=head.valid_vocab,
            tp_group=head.tp_group,
        )
        return out.loss, {}

    return loss


def preference(token: int, weight: float) -> LossFn:
    """Bradley-Terry on pairs: documents 2i (chosen) and 2i + 1 (rejected) of every batch.

    A document's scalar is the logit of `token` at its end: the scalar head is that lm_head row.
    weight: of each pair in the global sum.
    """

    def loss(head: LMHead, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = scalar(head, batch, token).view(-1, 2).unbind(1)
        value = -torch.nn.functional.logsigmoid(chosen - rejected).sum() * weight
        return value, {"right": (chosen > rejected).sum() * weight}

    return loss


def scalar(head: LMHead, batch: Batch, token: int) -> Tensor:
    """(B,) the preference model's scalar of each document."""
    ends = head.hidden[batch.cu_seqlens[1:].long() - 1]
    return ends @ head.rows(torch.tensor([token], device=ends.device))[0]
