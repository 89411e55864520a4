"""Log-probability of targets, and entropy, from hidden states: the lm_head without its logits.

Per row four numbers carry everything: m = max z, s = sum e^(z-m), t = sum e^(z-m)(z-m) and the
target's z. They merge over shards of the vocabulary. Then log p = z_y - m - ln s and the entropy is
H = ln s - t/s. With g the gradients of the two, the logits' gradient is
g_logp (1[y] - p) - g_H p (ln p + H); the backward recomputes p from the saved log-sum-exp.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from q3mega.ops import vocab
from q3mega.ops.dispatch import own_precision, register, resolve


class LinearLogprobOutput(NamedTuple):
    """logprob (N,): log p of the targets. entropy (N,): in nats. Both differentiable."""

    logprob: Tensor
    entropy: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> LinearLogprobOutput:
    """Per-token log p(target) and entropy in nats, both (N,), fp32 and differentiable.

    hidden (N, H): hidden states before the lm_head
    weight (V, H): the lm_head, or with tp_group this rank's equal shard of its rows
    targets (N,) int64: global token ids, each of them of the vocabulary
    temperature: divides the logits
    valid_vocab: ids from here on are padding rows of the lm_head and have no mass
    backend: see `q3mega.ops.dispatch`

    fp64 operands give fp64 results. Raises UserError for a temperature that is not positive, shapes
    that do not fit or ids that the vocabulary does not have, RuntimeError for a backend that is not
    there.
    """
    vocab.check(hidden, weight, temperature, targets=targets)
    logprob, entropy = resolve("linear_logprob", backend, hidden)(
        hidden, weight, targets, temperature, valid_vocab, tp_group
    )
    return LinearLogprobOutput(logprob, entropy)


@register("linear_logprob", "reference")
def _reference(*operands: Any) -> tuple[Tensor, Tensor]:
    logprob, entropy = _LinearLogprob.apply(*operands)
    return logprob, entropy


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
        column, held = vocab.shard_index(targets, weight, valid_vocab, group)
        stats = hidden.new_empty(len(hidden), 4, dtype=vocab.stat_dtype(hidden))
        for rows in vocab.slices(len(hidden), weight):
            z = vocab.logits(hidden[rows], weight, temperature, valid_vocab, group)
            target = z.gather(1, column[rows, None])[:, 0] * held[rows]
            top = z.amax(1)
            e = z.sub_(top[:, None]).exp()
            stats[rows] = torch.stack([top, e.sum(1), z.mul_(e).sum(1), target], 1)
        m, s, t, z_y = merge(stats, group)
        entropy = s.log() - t / s
        ctx.save_for_backward(hidden, weight, column, held, m + s.log(), entropy)
        ctx.settings = temperature, valid_vocab, group
        ctx.set_materialize_grads(False)  # an unused entropy costs nothing in the backward
        return z_y - m - s.log(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> Any:
        hidden, weight, column, held, lse, entropy = ctx.saved_tensors
        temperature, _, group = ctx.settings
        g_logp = torch.zeros_like(lse) if g_logp is None else g_logp
        active = g_logp != 0 if g_entropy is None else (g_logp != 0) | (g_entropy != 0)
        # Prompt and clipped tokens have no gradient: skip their rows.
        index = active.nonzero()[:, 0]
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=lse.dtype)
        with own_precision(hidden):
            for block in vocab.slices(len(index), weight):
                rows = index[block]
                h, g = hidden[rows], g_logp[rows, None]
                z = vocab.logits(h, weight, *ctx.settings).sub_(lse[rows, None])  # ln p
                dz = z.exp()
                if g_entropy is None:
                    dz.mul_(-g)
                else:
                    dz.mul_(z.add_(entropy[rows, None]).mul_(-g_entropy[rows, None]).sub_(g))
                dz.scatter_add_(1, column[rows, None], g * held[rows, None])
                dz.div_(temperature)
                if ctx.needs_input_grad[0]:
                    d_hidden[rows] = (dz @ weight.to(dz.dtype)).to(hidden.dtype)
                if ctx.needs_input_grad[1]:
                    d_weight.addmm_(dz.T, h.to(dz.dtype))
        if group is not None and len(hidden):
            dist.all_reduce(d_hidden, group=group)
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def merge(stats: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """(m, s, t, z_y) of the whole vocabulary, each (N,), from the ranks' (N, 4): one all-gather."""
    if group is None or not len(stats):
        return stats.unbind(1)
    shards = stats.new_empty(dist.get_world_size(group) * len(stats), 4)
    dist.all_gather_into_tensor(shards, stats, group=group)
    m, s, t, z_y = shards.view(-1, *stats.shape).unbind(2)
    top = m.amax(0)
    down, scale = m - top, (m - top).exp()
    return top, (s * scale).sum(0), (scale * (t + s * down)).sum(0), z_y.sum(0)
