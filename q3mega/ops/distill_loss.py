"""Divergence of a student to its teacher over the whole vocabulary, from hidden states.

forward_kl: KL(teacher || student). reverse_kl: KL(student || teacher). jsd: beta KL(T || M) +
(1 - beta) KL(S || M) with M = beta T + (1 - beta) S. Distributions at `temperature`, values times
its square (Hinton et al., 1503.02531). The teacher gets no gradient.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from q3mega.errors import UserError
from q3mega.ops import vocab
from q3mega.ops.dispatch import register, resolve

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class DistillOutput(NamedTuple):
    """loss (): differentiable sum of per_token times loss_weights.

    per_token (N,), nats times temperature squared: detached, 0 at tokens without weight.
    """

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
    """Sum over tokens of loss_weights times a divergence, times temperature squared.

    student_hidden (N, H): hidden states before the lm_head
    student_weight (V, H): the lm_head, or with tp_group this rank's equal shard of its rows
    teacher_hidden (N, H_t), teacher_weight (V, H_t): the teacher's, cut like the student's; or
    teacher_topk: ids (N, K) int64, distinct in a row, and log-probabilities (N, K) at `temperature`
    divergence, beta: see the module's text; beta in (0, 1), for jsd
    loss_weights (N,) fp32: default ones
    tail: with teacher_topk, one bucket holds the rest of the vocabulary; without it both sides are
        renormalised on the K ids
    valid_vocab: ids from here on are padding rows of the lm_head and have no mass
    backend: see `q3mega.ops.dispatch`

    Raises UserError for a missing or double teacher, an unknown divergence or shapes that do not
    fit.
    """
    rows: dict[str, Tensor | None] = {"teacher_hidden": teacher_hidden}
    if teacher_topk is not None:
        rows |= {"teacher_ids": teacher_topk[0], "teacher_logprobs": teacher_topk[1]}
    vocab.check(student_hidden, student_weight, temperature, loss_weights=loss_weights, **rows)
    _check(student_weight, teacher_hidden, teacher_weight, teacher_topk, divergence, beta, tp_group)
    if loss_weights is None:
        loss_weights = student_hidden.new_ones(len(student_hidden), dtype=torch.float32)
    if teacher_topk is not None:
        ids, logprobs = teacher_topk
        # a token without weight may have anything for ids
        teacher_topk = torch.where(loss_weights[:, None] != 0, ids, 0), logprobs
    output: DistillOutput = resolve("distill_loss", backend, student_hidden)(
        student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_topk,
        divergence, beta, temperature, loss_weights, tail, valid_vocab, tp_group,
    )  # fmt: skip
    return output


def _check(
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_topk: tuple[Tensor, Tensor] | None,
    divergence: Divergence,
    beta: float,
    tp_group: dist.ProcessGroup | None,
) -> None:
    """Raise UserError for an unknown divergence, or a teacher that is missing or does not fit."""
    if divergence not in get_args(Divergence):
        raise UserError(f"divergence={divergence!r}: choose forward_kl, reverse_kl or jsd")
    if divergence == "jsd" and not 0 < beta < 1:
        raise UserError(f"beta={beta}: must lie between 0 and 1; at its ends take one of the KLs")
    if (teacher_topk is None) == (teacher_hidden is None or teacher_weight is None):
        raise UserError("teacher: give teacher_hidden and teacher_weight, or else teacher_topk")
    if teacher_weight is not None and len(teacher_weight) != len(student_weight):
        raise UserError(
            f"teacher_weight has {len(teacher_weight)} rows, student_weight {len(student_weight)}: "
            "cut both to their common vocabulary"
        )
    if teacher_topk is not None:
        ids, logprobs = teacher_topk
        vocabulary = vocab.vocabulary_size(student_weight, tp_group)
        if ids.shape != logprobs.shape or ids.shape[1] > vocabulary:
            raise UserError(
                f"teacher_topk {tuple(ids.shape)}, {tuple(logprobs.shape)}: must both be (N, K), K "
                f"at most the vocabulary's {vocabulary}"
            )


@register("distill_loss", "reference")
def _reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    divergence: Divergence,
    beta: float,
    temperature: float,
    w: Tensor,
    tail: bool,
    valid_vocab: int | None,
    group: dist.ProcessGroup | None,
) -> DistillOutput:
    def full(h: Tensor, t: Tensor) -> Tensor:
        assert teacher_weight is not None
        student = vocab.log_probs(h, weight, temperature, valid_vocab, group)
        with torch.no_grad():
            teacher = vocab.log_probs(t, teacher_weight, temperature, valid_vocab, group)
        return vocab.reduce_from_tp_region(
            _divergence(student, teacher, divergence, beta).sum(-1), group
        )

    def top(h: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
        logp = vocab.log_probs(h, weight, temperature, valid_vocab, group)
        column, held = vocab.shard_index(ids, weight, valid_vocab, group)
        student = vocab.reduce_from_tp_region(logp.gather(1, column) * held, group)
        teacher = bucketed(teacher.to(student.dtype), tail)
        if tail:
            student = torch.cat([student, _tail(logp, column, held, group)], 1)
        else:
            student = student.log_softmax(1)
        return _divergence(student, teacher, divergence, beta).sum(-1)

    if topk is None:
        assert teacher_hidden is not None
        per_token = vocab.by_rows(full, (hidden, teacher_hidden.detach()), weight)
    else:
        per_token = vocab.by_rows(top, (hidden, topk[0], topk[1].detach()), weight)
    per_token = torch.where(w != 0, per_token * temperature**2, 0.0)
    return DistillOutput((per_token * w).sum(), per_token.detach())


def bucketed(teacher: Tensor, tail: bool) -> Tensor:
    """(n, K) log-probabilities as a distribution: (n, K + 1) with the tail, or (n, K)."""
    if not tail:
        return teacher.log_softmax(1)
    minus_topk_mass = -teacher.exp().sum(1, keepdim=True).clamp(max=1 - 1e-7)
    return torch.cat([teacher, minus_topk_mass.log1p()], 1)


def bucket_terms(
    student: Tensor, teacher: Tensor, kind: Divergence, beta: float
) -> tuple[Tensor, Tensor]:
    """(value (n,), slope (n, B)) of log-probabilities over B buckets.

    slope: a logit's gradient is its probability times the slope of its bucket. With f' the
    derivative by a bucket's mass it is f' minus the mean of f' under the student.
    """
    q = student.exp()
    if kind == "forward_kl":
        by_mass = -(teacher - student).exp()
    elif kind == "reverse_kl":
        by_mass = student - teacher
    else:
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        by_mass = (1 - beta) * (student - mixture)
    value = _divergence(student, teacher, kind, beta).sum(-1)
    return value, by_mass - (q * by_mass).sum(-1, keepdim=True)


def _tail(logp: Tensor, column: Tensor, held: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(n, 1) log of the student's mass outside the K ids.

    Summed over those ids, not taken as one minus the K: a confident student has less there than
    fp32 resolves next to 1, and a rounded or clamped tail would lose its gradient.
    """
    inside = torch.zeros_like(logp, dtype=torch.bool)
    rows, picks = held.nonzero(as_tuple=True)
    inside[rows, column[rows, picks]] = True
    mass = vocab.reduce_from_tp_region(
        logp.exp().masked_fill(inside, 0.0).sum(1, keepdim=True), group
    )
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def _divergence(student: Tensor, teacher: Tensor, kind: Divergence, beta: float) -> Tensor:
    """Per-entry terms of the divergence between log-probabilities."""
    if kind == "forward_kl":
        return teacher.exp() * (teacher - student)
    if kind == "reverse_kl":
        return student.exp() * (student - teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = beta * teacher.exp() * (teacher - mixture)
    return of_teacher + (1 - beta) * student.exp() * (student - mixture)
