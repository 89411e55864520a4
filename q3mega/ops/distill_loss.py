"""Divergence of a student to its teacher over the whole vocabulary, from hidden states.

forward_kl: KL(teacher || student). reverse_kl: KL(student || teacher). jsd: beta KL(T || M) +
(1 - beta) KL(S || M) with M = beta T + (1 - beta) S. Distributions at `temperature`, values times
its square (Hinton et al., 1503.02531). The teacher gets no gradient.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from q3mega.ops import vocab
from q3mega.ops.dispatch import register, resolve
from q3mega.ops.linear_logprob import check

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class DistillOutput(NamedTuple):
    """loss: differentiable sum of per_token times loss_weights; per_token (N,) detached."""

    loss: Tensor
    per_token: Tensor


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    loss_weights: Tensor | None = None,
    tail: bool = True,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> DistillOutput:
    """student_hidden (N, H), student_weight (V, H) or the rank's shard; the teacher either as
    hidden (N, H_t) with its own weight (V, H_t), cut like the student's, or as teacher_topk =
    (ids (N, K) int64, log-probabilities (N, K) at this temperature). tail: one bucket holds the
    rest of the vocabulary; without it both sides are renormalised on the K ids. loss_weights (N,).
    Raises ValueError for a missing or double teacher or an unknown divergence.
    """
    check(student_hidden, student_weight, student_hidden, temperature)
    if divergence not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f"divergence={divergence!r}: choose forward_kl, reverse_kl or jsd")
    if (teacher_topk is None) == (teacher_hidden is None or teacher_weight is None):
        raise ValueError("give the teacher either as teacher_hidden and teacher_weight or as teacher_topk")
    if loss_weights is None:
        loss_weights = student_hidden.new_ones(len(student_hidden), dtype=torch.float32)
    return resolve("distill_loss", backend)(
        student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_topk,
        divergence, beta, temperature, loss_weights, tail, valid_vocab, tp_group,
    )  # fmt: skip


@register("distill_loss", "reference")
def _reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    divergence: str,
    beta: float,
    temperature: float,
    w: Tensor,
    tail: bool,
    valid_vocab: int | None,
    group: dist.ProcessGroup | None,
) -> DistillOutput:
    def full(h: Tensor, t: Tensor) -> tuple[Tensor]:
        assert teacher_weight is not None
        student = vocab.log_probs(h, weight, temperature, valid_vocab, group)
        with torch.no_grad():
            teacher = vocab.log_probs(t, teacher_weight, temperature, valid_vocab, group)
        return (vocab.total(_divergence(student, teacher, divergence, beta).sum(-1), group),)

    def top(h: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor]:
        logp = vocab.log_probs(h, weight, temperature, valid_vocab, group)
        student = vocab.pick(logp, ids, weight, group)
        student, teacher = _with_rest(student, tail), _with_rest(teacher.float(), tail)
        return (_divergence(student, teacher, divergence, beta).sum(-1),)

    if topk is None:
        assert teacher_hidden is not None
        (per_token,) = vocab.by_rows(full, (hidden, teacher_hidden.detach()), len(weight))
    else:
        (per_token,) = vocab.by_rows(top, (hidden, topk[0], topk[1].detach()), len(weight))
    per_token = per_token * temperature**2
    return DistillOutput((per_token * w).sum(), per_token.detach())


def _with_rest(logp: Tensor, tail: bool) -> Tensor:
    """(N, K) -> (N, K + 1) with the log of the remaining mass, or renormalised (N, K)."""
    if not tail:
        return logp.log_softmax(-1)
    rest = torch.log1p(-logp.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    return torch.cat([logp, rest], -1)


def _divergence(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """Per-entry terms of the divergence between log-probabilities."""
    if kind == "forward_kl":
        return teacher.exp() * (teacher - student)
    if kind == "reverse_kl":
        return student.exp() * (student - teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    first = beta * teacher.exp() * (teacher - mixture)
    return first + (1 - beta) * student.exp() * (student - mixture)
