"""What the lm-head operators share: logits by slices of rows, of a vocabulary maybe cut over ranks.

Two conjugate collectives (Megatron-LM, 1909.08053) make plain autograd right under vocabulary
parallelism. `copy_to_tp_region` hands a tensor that all ranks hold to ranks that each use a part of
it: the gradient is summed. `reduce_from_tp_region` sums the ranks' partial results into a tensor
that all ranks hold: the gradient is passed through.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from q3mega.errors import UserError

# Bytes of logits at once. On a CPU small blocks are reused by the allocator, while those above
# 32 MiB are fresh pages each time: there a pass over the logits takes five times as long.
CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 16 << 20, 256 << 20
MASKED = -1e30  # the logit of an absent id; finite, so that 0 * it is 0, not NaN


class _CopyToTpRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromTpRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_tp_region(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x, which all ranks of `group` hold; its gradient is the sum of theirs (None: one rank)."""
    return x if group is None else _CopyToTpRegion.apply(x, group)


def reduce_from_tp_region(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the ranks' x; its gradient goes to each rank as it is (None: one rank)."""
    return x if group is None else _ReduceFromTpRegion.apply(x, group)


def check(hidden: Tensor, weight: Tensor, temperature: float, **rows: Tensor | None) -> None:
    """Raise UserError on what no lm-head operator can take; `rows` are (N, ...) by name."""
    if not temperature > 0:
        raise UserError(f"temperature={temperature}: must be positive")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: must be (N, H), (V, H)"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise UserError(f"hidden {hidden.dtype}, weight {weight.dtype}: must be floating point")
    for name, row in {"weight": weight, **rows}.items():
        if row is None:
            continue
        dimensions = 2 if name.startswith("teacher") else 1
        if row is not weight and (row.dim() != dimensions or len(row) != len(hidden)):
            shape = f"({len(hidden)}, ...)" if dimensions == 2 else f"({len(hidden)},)"
            raise UserError(f"{name} {tuple(row.shape)}: must be {shape}, a row each of hidden's")
        if row.device != hidden.device:
            raise UserError(f"{name} is on {row.device}, hidden on {hidden.device}: move one")
        if name in ("targets", "teacher_ids", "seq_ids") and row.dtype != torch.int64:
            raise UserError(f"{name} {row.dtype}: must be int64")


def vocabulary_size(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Rows of the whole lm_head of which `weight` is this rank's shard."""
    return len(weight) * (1 if group is None else dist.get_world_size(group))


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise UserError on ids that a vocabulary of that size does not have."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        present = f"{int(ids.min())}..{int(ids.max())}"
        raise UserError(f"ids lie in {present}: the vocabulary has 0..{vocabulary - 1}")


def stat_dtype(x: Tensor) -> torch.dtype:
    """Logits and statistics are fp32, or fp64 for fp64 operands."""
    return torch.promote_types(x.dtype, torch.float32)


def shard_offset(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """The vocabulary id of this rank's first row of the lm_head."""
    return 0 if group is None else dist.get_rank(group) * len(weight)


def slices(n: int, weight: Tensor) -> Iterator[slice]:
    """Slices of n rows whose logits are small enough to be held at once."""
    budget = CPU_LOGITS_BYTES if weight.device.type == "cpu" else GPU_LOGITS_BYTES
    step = max(1, budget // (len(weight) * stat_dtype(weight).itemsize))
    return (slice(i, i + step) for i in range(0, n, step))


def logits(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    valid_vocab: int | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """(n, V or the rank's shard of it) hidden @ weight.T / temperature in `stat_dtype`.

    Ids from `valid_vocab` on are padding rows of the lm_head: no mass, no gradient.
    """
    dtype = stat_dtype(hidden)
    z = (hidden.to(dtype) / temperature) @ weight.to(dtype).T
    first_id = shard_offset(weight, group)
    if valid_vocab is None or first_id + len(weight) <= valid_vocab:
        return z
    ids = torch.arange(first_id, first_id + len(weight), device=weight.device)
    return z.masked_fill(ids >= valid_vocab, MASKED)


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    valid_vocab: int | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Log-softmax of `logits` over the whole vocabulary, differentiable by autograd."""
    z = logits(copy_to_tp_region(hidden, group), weight, temperature, valid_vocab, group)
    if group is None:
        return z.log_softmax(-1)
    top = z.detach().amax(-1, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    mass = reduce_from_tp_region((z - top).exp().sum(-1, keepdim=True), group)
    return z - copy_to_tp_region(top + mass.log(), group)


def by_rows(fn: Callable[..., Tensor], rows: Sequence[Tensor], weight: Tensor) -> Tensor:
    """fn over slices of `rows` (all of length N); more than one slice is recomputed in backward."""
    slices_of_rows = list(slices(len(rows[0]), weight))
    if len(slices_of_rows) <= 1:
        return fn(*rows)
    return torch.cat(
        [
            checkpoint(fn, *(r[p] for r in rows), use_reentrant=False, preserve_rng_state=False)
            for p in slices_of_rows
        ]
    )


def shard_index(
    ids: Tensor, weight: Tensor, valid_vocab: int | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(column in this rank's shard, whether the shard holds it) of every global id.

    An id of another rank has column 0.
    """
    vocabulary = vocabulary_size(weight, group)
    check_ids(ids, vocabulary if valid_vocab is None else min(vocabulary, valid_vocab))
    column = ids - shard_offset(weight, group)
    held = (column >= 0) & (column < len(weight))
    return column * held, held
