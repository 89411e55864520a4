"""What the lm-head operators share: log-probabilities over a vocabulary that may be cut over ranks.

Two conjugate collectives (Megatron-LM, 1909.08053) make plain autograd right under vocabulary
parallelism: `spread` hands a replicated tensor to ranks that each use a part (its gradient is summed), and
`total` sums the ranks' parts into a replicated tensor (its gradient is passed through).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROW_BYTES = 256 << 20  # logits held at once; more rows than fit are recomputed in the backward


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def spread(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return x if group is None else _Spread.apply(x, group)


def total(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return x if group is None else _Total.apply(x, group)


def offset(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """The vocabulary id of this rank's first row of the lm_head."""
    return 0 if group is None else dist.get_rank(group) * len(weight)


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    valid_vocab: int | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """(n, V or the rank's shard of it) fp32 log-softmax of hidden @ weight.T / temperature.

    Ids from `valid_vocab` on are padding rows of the lm_head: no mass, no gradient.
    """
    logits = (spread(hidden, group) @ weight.T).float() / temperature
    if valid_vocab is not None:
        ids = torch.arange(len(weight), device=weight.device) + offset(weight, group)
        logits = logits.masked_fill(ids >= valid_vocab, torch.finfo(torch.float32).min)
    if group is None:
        return logits.log_softmax(-1)
    top = logits.detach().max(-1, keepdim=True).values
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    mass = total((logits - top).exp().sum(-1, keepdim=True), group)
    return logits - spread(top + mass.log(), group)


def pick(logp: Tensor, ids: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """logp[i, ids[i, ...]] over the whole vocabulary; ids (n, ...) are global."""
    local = ids - offset(weight, group)
    mine = (local >= 0) & (local < logp.shape[-1])
    found = logp.gather(-1, local.clamp(0, logp.shape[-1] - 1).flatten(1)).view(ids.shape)
    return total(found * mine, group)


def by_rows(
    fn: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], vocabulary: int
) -> tuple[Tensor, ...]:
    """fn over slices of `rows` (all of length N) so small that their logits stay within ROW_BYTES."""
    n, step = len(rows[0]), max(1, ROW_BYTES // (4 * vocabulary))
    if n <= step:
        return fn(*rows)
    parts = [
        checkpoint(fn, *(r[i : i + step] for r in rows), use_reentrant=False)
        for i in range(0, n, step)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
