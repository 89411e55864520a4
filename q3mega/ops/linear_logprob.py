"""Log-probability of targets, and entropy, from hidden states: the lm_head without its logits.

Per row the vocabulary is reduced to four numbers, m = max z, s = sum e^(z-m), t = sum e^(z-m)(z-m)
and the target's z, which merge over shards of the vocabulary. Then log p = z_y - m - ln s and the
entropy is H = ln s - t/s. With g the gradients of the two, the logits' gradient is
g_logp (1[y] - p) - g_H p (ln p + H); the backward recomputes p from the saved log-sum-exp.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from q3mega.ops import vocab
from q3mega.ops.dispatch import register, resolve


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token log p(target) and entropy in nats, both (N,) fp32 and differentiable.

    hidden (N, H); weight (V, H), or with `tp_group` the rank's equal shard of it; targets (N,)
    int64, global ids. temperature divides the logits; ids from valid_vocab on have no mass. fp64
    operands give fp64 results. Raises UserError for a temperature that is not positive or shapes
    that do not fit, RuntimeError for a backend that is not there.
    """
    vocab.check(hidden, weight, temperature, targets=targets)
    return resolve("linear_logprob", backend)(
        hidden, weight, targets, temperature, valid_vocab, tp_group
    )


@register("linear_logprob", "reference")
def _reference(*operands: Any) -> tuple[Tensor, Tensor]:
    return _LinearLogprob.apply(*operands)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        valid_vocab: int | None,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        head = (weight, temperature, valid_vocab, group)
        column = targets - vocab.offset(weight, group)
        here = (column >= 0) & (column < len(weight))  # this rank holds the target's logit
        stats = hidden.new_empty(len(hidden), 4, dtype=vocab.stat_dtype(hidden))
        for rows in vocab.slices(len(hidden), weight):
            z = vocab.logits(hidden[rows], *head)
            picked = z.gather(1, (column * here)[rows, None])[:, 0] * here[rows]
            top = z.amax(1)
            e = z.sub_(top[:, None]).exp()
            stats[rows] = torch.stack([top, e.sum(1), e.mul_(z).sum(1), picked], 1)
        m, s, t, z_y = _merge(stats, group)
        entropy = s.log() - t / s
        ctx.head, ctx.set_materialize_grads = head, ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, column, here, m + s.log(), entropy)
        return z_y - m - s.log(), entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, column, here, lse, entropy = ctx.saved_tensors
        return hidden, column, here, lse, entropy
