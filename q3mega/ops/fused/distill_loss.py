"""distill_loss on row kernels: the forward computes the gradients too (docs/operators.md).

The teacher is a second lm_head, or its K best log-probabilities, with or without one more bucket
for the rest of the vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from q3mega.ops import vocab
from q3mega.ops.distill_loss import DistillOutput, Divergence, bucket_terms, bucketed
from q3mega.ops.fused import lm_head
from q3mega.ops.fused.lm_head import (
    STATS_DTYPE,
    BlockedHead,
    Gradients,
    backward_of_kept_gradients,
    fake_gradients,
    gemm_operands,
    keep_gradients,
    register_on_backends,
    row_blocks,
    schema_options,
    wants_gradients,
)

TENSORS_PER_BUCKET = 16  # about as many (n, K) tensors a top-k teacher's divergence holds


@torch.library.custom_op("q3mega::distill_loss", mutates_args=())
def _distill(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, w: Tensor,
    divergence: str, beta: float, temperature: float, valid: int, group: str, backend: str,
    hidden_needs_grad: bool, weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    same = temperature, valid, group, backend, len(hidden)
    head = BlockedHead(weight, *same, weight_needs_grad)
    teacher = BlockedHead(teacher_weight, *same, same_blocks_as=head)
    gradients = Gradients(hidden, head, (hidden_needs_grad, weight_needs_grad))
    per_token = hidden.new_zeros(len(hidden), dtype=STATS_DTYPE)
    for rows in row_blocks((w != 0).nonzero()[:, 0], head):
        h, t = head.logits(hidden[rows]), teacher.logits(teacher_hidden[rows])
        no_target = torch.full_like(rows, -1)
        (_, _, lse), (_, _, lse_t) = head.stats(h, no_target), teacher.stats(t, no_target)
        lse, lse_t = lse.contiguous(), lse_t.contiguous()
        pair = h, t, head.valid_columns, lse, lse_t, divergence, beta
        sums = head.kernels.divergence_sums(*pair)
        if head.group is not None:
            all_reduce(sums, group=head.group)
        first, second = sums.unbind(1)
        jsd = divergence == "jsd"
        per_token[rows] = beta * first + (1 - beta) * second if jsd else first
        if hidden_needs_grad or weight_needs_grad:
            student_part, g = (second if jsd else first).contiguous(), w[rows]
            head.kernels.divergence_gradient(*pair, student_part, g)
            gradients.add(rows, hidden[rows], h)
    return _squared(temperature, w, per_token, gradients)


def _squared(
    temperature: float, w: Tensor, per_token: Tensor, gradients: Gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, per_token, d_hidden, d_weight), all times temperature squared."""
    per_token = per_token * temperature**2
    d_hidden, d_weight = gradients.reduced()
    if temperature != 1:
        d_hidden, d_weight = d_hidden.mul_(temperature**2), d_weight.mul_(temperature**2)
    return (per_token * w).sum(), per_token, d_hidden, d_weight


@_distill.register_fake
def _(hidden: Tensor, weight: Tensor, *options: Any) -> Any:
    outs = (hidden.new_empty(shape, dtype=STATS_DTYPE) for shape in ((), len(hidden)))
    return *outs, *fake_gradients(hidden, weight, options[-2], options[-1])


_distill.register_autograd(backward_of_kept_gradients, setup_context=keep_gradients)


@torch.library.custom_op("q3mega::distill_topk", mutates_args=())
def _distill_topk(
    hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, w: Tensor, divergence: str,
    beta: float, temperature: float, valid: int, group: str, backend: str,
    hidden_needs_grad: bool, weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """teacher (N, K + 1): log-probabilities of the ids, and of the tail in the last column.

    A logit outside the ids matters by its part of the tail's mass alone.
    """
    head = BlockedHead(weight, temperature, valid, group, backend, len(hidden), weight_needs_grad)
    gradients = Gradients(hidden, head, (hidden_needs_grad, weight_needs_grad))
    per_token, column = hidden.new_zeros(len(hidden), dtype=STATS_DTYPE), head.shard_columns(ids)
    for rows in row_blocks((w != 0).nonzero()[:, 0], head):
        h, c = hidden[rows], column[rows]
        z, no_target = head.logits(h), torch.full_like(rows, -1)
        lse = head.stats(z, no_target)[2]
        held, held_columns = c >= 0, c.clamp(min=0)
        logits = torch.where(held, z.gather(1, held_columns), 0.0)
        if head.group is not None:
            all_reduce(logits, group=head.group)
        row, pick = held.nonzero(as_tuple=True)
        z[row, c[row, pick]] = vocab.MASKED
        tail_logit = head.stats(z, no_target)[2]  # summed, not one minus the ids: see distill_loss
        student = torch.cat([logits, tail_logit[:, None]], 1) - lse[:, None]
        per_token[rows], slope = bucket_terms(
            student, teacher[rows], cast(Divergence, divergence), beta
        )
        slope = (slope * w[rows, None]).contiguous()
        head.gradient(z, no_target, lse, lse, -slope[:, -1], torch.zeros_like(lse))
        inside = student[:, :-1].exp() * slope[:, :-1]
        z[row, c[row, pick]] = inside[row, pick]
        gradients.add(rows, h, z)
    return _squared(temperature, w, per_token, gradients)


@torch.library.custom_op("q3mega::distill_renormalised", mutates_args=())
def _distill_renormalised(
    hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, w: Tensor, divergence: str,
    beta: float, temperature: float, group: str, backend: str,
    hidden_needs_grad: bool, weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """teacher (N, K). Reads the ids' rows of the lm_head alone: no GEMM over the vocabulary."""
    head = BlockedHead(weight, temperature, -1, group, backend, 1)
    gradients = Gradients(hidden, head, (hidden_needs_grad, weight_needs_grad))
    per_token, column = hidden.new_zeros(len(hidden), dtype=STATS_DTYPE), head.shard_columns(ids)
    step = max(
        1, lm_head.CPU_LOGITS_BYTES // (4 * (hidden.shape[1] + TENSORS_PER_BUCKET * ids.shape[1]))
    )
    active = (w != 0).nonzero()[:, 0]
    for rows in active.split(step) if len(active) else ():
        h, picked = hidden[rows], column[rows]
        logits = head.kernels.picked_logits(h, weight, picked) / temperature
        if head.group is not None:
            all_reduce(logits, group=head.group)
        student = logits.log_softmax(1)
        per_token[rows], slope = bucket_terms(
            student, teacher[rows], cast(Divergence, divergence), beta
        )
        dz = student.exp() * slope * w[rows, None] / temperature
        gradients.add_picked(rows, h, dz, picked)
    return _squared(temperature, w, per_token, gradients)


for _op in (_distill_topk, _distill_renormalised):

    @_op.register_fake
    def _(hidden: Tensor, weight: Tensor, *options: Any) -> Any:
        outs = (hidden.new_empty(shape, dtype=STATS_DTYPE) for shape in ((), len(hidden)))
        return *outs, *fake_gradients(hidden, weight, options[-2], options[-1])

    _op.register_autograd(backward_of_kept_gradients, setup_context=keep_gradients)


def _distill_loss(
    backend: str,
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
    group: ProcessGroup | None,
) -> DistillOutput:
    needs_grad = wants_gradients(hidden, weight)
    student = gemm_operands(backend, hidden, weight)
    w = w.detach().float().contiguous()
    how = w, divergence, beta, temperature
    if topk is None:
        assert teacher_hidden is not None and teacher_weight is not None
        with torch.no_grad():
            teacher = gemm_operands(backend, teacher_hidden, teacher_weight)
        out = _distill(
            *student, *teacher, *how, *schema_options(valid_vocab, group, backend), *needs_grad
        )
    else:
        ids, logprobs = topk[0], bucketed(topk[1].detach().float(), tail)
        if tail:
            out = _distill_topk(
                *student,
                ids,
                logprobs,
                *how,
                *schema_options(valid_vocab, group, backend),
                *needs_grad,
            )
        else:
            out = _distill_renormalised(
                *student,
                ids,
                logprobs,
                *how,
                *schema_options(valid_vocab, group, backend)[1:],
                *needs_grad,
            )
    return DistillOutput(out[0], out[1].detach())


register_on_backends("distill_loss", _distill_loss)
