"""What the lm-head operators share: blocks of logits in one buffer instead of (N, V) logits.

One buffer serves all blocks, since fresh pages would cost a CPU more than the arithmetic on them.
Tokens that can get no gradient never reach a gradient's GEMM. The GEMMs are the vendor's (MKL,
cuBLAS); the row kernels are the backend's. The operators are registered with torch.library, with
fakes and autograd, so torch.compile takes them.
"""

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.distributed_c10d import _resolve_process_group

from q3mega.ops import vocab
from q3mega.ops.backends import KERNELS
from q3mega.ops.dispatch import register
from q3mega.ops.linear_logprob import merge

# The buffer of logits on a CPU: 220 rows of Qwen3's vocabulary. It grows to a quarter of d_weight,
# since every block passes over d_weight once, and fewer blocks make fewer passes.
CPU_LOGITS_BYTES = 128 << 20
CPU_GEMM_COLUMNS = 2048  # columns of one GEMM, which then stay in the cache: a tenth faster
GPU_LOGITS_BYTES = 1 << 30  # 1,767 rows of Qwen3's vocabulary: a GEMM that fills the GPU
STATS_DTYPE = torch.float32  # of logits, statistics and sums, whatever the operands' dtype


_thread_buffers = threading.local()


def _scratch(like: Tensor, rows: int, columns: int, slot: int) -> Tensor:
    """An uninitialised fp32 buffer (rows, columns).

    A CPU thread keeps one buffer a slot for its next call, since the first touch of fresh pages
    costs more than a pass over them.
    """
    if like.is_cuda:
        return like.new_empty(rows, columns)
    slots = _thread_buffers.__dict__.setdefault("slots", {})
    if slot not in slots or slots[slot].numel() < rows * columns:
        with torch.inference_mode(False):  # else only such calls could write to it again
            slots[slot] = _large_pages(rows * columns)
    return slots[slot][: rows * columns].view(rows, columns)


def _large_pages(size: int) -> Tensor:
    """(size,) fp32 in pages of 2 MiB where the system has them.

    A GEMM and a row kernel walk through hundreds of rows at once, which begin far apart.
    """
    if not size:
        return torch.empty(0, dtype=STATS_DTYPE)
    memory = mmap.mmap(-1, 4 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # only Linux has them, and not everywhere
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=STATS_DTYPE)


class BlockedHead:
    """An lm_head, or this rank's shard of it, and the one buffer in which blocks of logits live.

    The loop that every lm-head operator runs; only one block of logits exists at a time:

        tokens      0 ...... block_rows ...... 2 block_rows ...... N
                    [ block 0 ][ block 1 ][ block 2 ]
        each block  hidden[rows] --GEMM--> logits (rows, shard_size), in the buffer
                    logits --row kernel--> `stats`: log p, entropy, log-sum-exp (rows,)
                    logits --row kernel--> `gradient`: d_logits, in place
                    d_logits --2 GEMMs---> `Gradients.add`: d_hidden[rows], d_weight

    block_rows: most rows that a block has.
    shard_size: rows of this rank's weight, and columns of the buffer.
    first_id: vocabulary id of the shard's first row.
    valid_columns: columns before the lm_head's padding; the rest have no mass and no gradient.
    """

    def __init__(
        self,
        weight: Tensor,
        temperature: float,
        valid_vocab: int,
        group: str,
        backend: str,
        rows: int,
        weight_needs_grad: bool = False,
        same_blocks_as: "BlockedHead | None" = None,
    ) -> None:
        """weight (V, H), or this rank's shard.
        valid_vocab: ids that have mass, -1 for all.
        group: name of the tensor-parallel process group, "" for none.
        rows: tokens in this call.
        weight_needs_grad: each block then passes over d_weight, so larger blocks pay.
        same_blocks_as: another head over the same vocabulary (a teacher's student): take its
        block_rows, and a second buffer.
        """
        self.weight, self.temperature, self.kernels = weight, temperature, KERNELS[backend]
        self.group = _resolve_process_group(group) if group else None  # type: ignore[arg-type]
        self.first_id, self.shard_size = vocab.shard_offset(weight, self.group), len(weight)
        vocabulary = vocab.vocabulary_size(weight, self.group)
        self.valid_vocab = vocabulary if valid_vocab < 0 else min(vocabulary, valid_vocab)
        self.valid_columns = min(max(self.valid_vocab - self.first_id, 0), self.shard_size)
        quarter_of_d_weight = weight.numel() if weight_needs_grad else 0  # bytes of fp32
        buffer_bytes = (
            GPU_LOGITS_BYTES if weight.is_cuda else max(CPU_LOGITS_BYTES, quarter_of_d_weight)
        )
        max_rows = max(1, buffer_bytes // (4 * self.shard_size))
        self.block_rows: int = (
            _even_block_rows(rows, max_rows)
            if same_blocks_as is None
            else same_blocks_as.block_rows
        )
        slot = 0 if same_blocks_as is None else 1
        needs_buffer = weight.dtype == STATS_DTYPE
        self.buffer = (
            _scratch(weight, self.block_rows, self.shard_size, slot) if needs_buffer else None
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, shard_size) fp32 of hidden (n, H), n <= block_rows. The next call overwrites them."""
        if self.buffer is not None:
            z, hidden = self.buffer[: len(hidden)], hidden / self.temperature
            width = self.shard_size if self.weight.is_cuda else CPU_GEMM_COLUMNS
            for columns, weight in zip(z.split(width, 1), self.weight.split(width), strict=True):
                torch.mm(hidden, weight.T, out=columns)
            return z
        z = torch.mm(hidden, self.weight.T, out_dtype=STATS_DTYPE)
        return z if self.temperature == 1 else z.div_(self.temperature)

    def shard_columns(self, ids: Tensor) -> Tensor:
        """Columns of the buffer that hold vocabulary ids; -1 for ids of other ranks."""
        vocab.check_ids(ids, self.valid_vocab)
        column = ids - self.first_id
        return torch.where((column >= 0) & (column < self.valid_columns), column, -1).contiguous()

    def stats(self, z: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log p of the column, entropy, log-sum-exp), each (n,), over the whole vocabulary."""
        m, s, t, z_y = merge(self.kernels.row_stats(z, self.valid_columns, column), self.group)
        log_mass = s.log()
        return z_y - m - log_mass, log_mass - t / s, m + log_mass

    def gradient(
        self, z: Tensor, column: Tensor, lse: Tensor, entropy: Tensor, g: Tensor, g_entropy: Tensor
    ) -> None:
        """In place: logits z become the gradient of sum g log p + g_entropy H by them."""
        lse, entropy, g, g_entropy = (x.contiguous() for x in (lse, entropy, g, g_entropy))
        self.kernels.row_gradient(
            z, self.valid_columns, column, lse, entropy, g, g_entropy if g_entropy.any() else None
        )


class Gradients:
    """d_hidden (N, H) and d_weight (V, H), filled block by block; empty where no one needs them.

    d_weight is fp32 whatever the weight's dtype: see `weight_gradient`.
    """

    def __init__(self, hidden: Tensor, head: BlockedHead, needs_grad: tuple[bool, bool]) -> None:
        self.head, (self.hidden_needs_grad, self.weight_needs_grad) = head, needs_grad
        self.hidden = torch.zeros_like(hidden) if needs_grad[0] else hidden.new_empty(0)
        self.weight: Tensor | None = None  # the first block writes it: pages are touched once

    def add(self, rows: Tensor, hidden: Tensor, dz: Tensor) -> None:
        """Adds a block. rows (n,): its tokens. hidden (n, H): theirs. dz (n, V): the gradient of
        the loss by the block's logits, hidden / temperature @ weight.T."""
        dz, t = dz.to(self.head.weight.dtype), self.head.temperature
        if self.hidden_needs_grad:
            self.hidden[rows] = (dz @ self.head.weight).div_(t)
        if not self.weight_needs_grad:
            return
        if dz.dtype == STATS_DTYPE and self.weight is not None:
            self.weight.addmm_(dz.T, hidden / t)
            return
        if dz.dtype == STATS_DTYPE:
            self.weight = dz.T @ (hidden / t)
        elif self.weight is None:
            self.weight = torch.mm(dz.T, hidden, out_dtype=STATS_DTYPE).div_(t)
        else:
            self.weight.add_(torch.mm(dz.T, hidden, out_dtype=STATS_DTYPE), alpha=1 / t)

    def add_picked(self, rows: Tensor, hidden: Tensor, dz: Tensor, picked: Tensor) -> None:
        """Adds a block whose logits are hidden @ weight[picked].T alone.

        picked (n, K): rows of this rank's weight, -1 for other ranks' rows. dz (n, K): the gradient
        of the loss by those logits.
        """
        if self.hidden_needs_grad:
            d_hidden = self.head.kernels.picked_d_hidden(dz, self.head.weight, picked)
            self.hidden[rows] = d_hidden.to(hidden.dtype)
        if self.weight_needs_grad:
            if self.weight is None:
                self.weight = torch.zeros_like(self.head.weight, dtype=STATS_DTYPE)
            self.head.kernels.picked_d_weight(dz, hidden, picked, self.weight)

    def reduced(self) -> tuple[Tensor, Tensor]:
        """(d_hidden, d_weight), the first summed over the tensor-parallel ranks."""
        if self.head.group is not None and self.hidden_needs_grad:
            all_reduce(self.hidden, group=self.head.group)
        if not self.weight_needs_grad:
            return self.hidden, self.hidden.new_empty(0)
        if self.weight is None:
            self.weight = torch.zeros_like(self.head.weight, dtype=STATS_DTYPE)
        return self.hidden, self.weight


def _even_block_rows(rows: int, max_rows: int) -> int:
    """Rows of a block when `rows` are cut evenly into the fewest blocks of at most `max_rows`."""
    return -(-rows // max(1, -(-rows // max_rows))) or 1


def row_blocks(index: Tensor, head: BlockedHead) -> Iterator[Tensor]:
    """The token indices (n,) in blocks of like size that the head's buffer holds."""
    return (
        iter(index.split(_even_block_rows(len(index), head.block_rows))) if len(index) else iter(())
    )


def schema_options(
    valid_vocab: int | None, group: ProcessGroup | None, backend: str
) -> tuple[int, str, str]:
    """The options in types that a torch.library schema takes."""
    return -1 if valid_vocab is None else valid_vocab, group.group_name if group else "", backend


def gemm_operands(backend: str, *pair: Tensor) -> tuple[Tensor, ...]:
    """hidden and weight in the GEMMs' dtype: fp32 on a CPU, which has no fast half precision."""
    dtype = STATS_DTYPE if backend == "cpu" else pair[0].dtype
    return tuple(x.to(dtype).contiguous() for x in pair)


def wants_gradients(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether hidden and weight need gradients from this call."""
    grads = torch.is_grad_enabled()
    return grads and hidden.requires_grad, grads and weight.requires_grad


def fake_gradients(hidden: Tensor, weight: Tensor, *needs_grad: bool) -> tuple[Tensor, Tensor]:
    """What `Gradients.reduced` returns, for torch.library's fakes."""
    hidden_needs_grad, weight_needs_grad = needs_grad
    return (
        torch.empty_like(hidden) if hidden_needs_grad else hidden.new_empty(0),
        torch.empty_like(weight, dtype=STATS_DTYPE) if weight_needs_grad else hidden.new_empty(0),
    )


def weight_gradient(weight: Tensor, d: Tensor) -> Tensor:
    """What autograd gets for d (V, H) fp32: the gradient in the weight's dtype.

    Under megatron's DistributedDataParallel a half-precision weight has an fp32 `main_grad`, to
    which the gradient is added unrounded. Autograd then gets a stand-in: any tensor, which
    megatron's hook drops, or zeros for a tied embedding (`zero_out_wgrad`), whose gradient the hook
    adds to the embedding's own.
    """
    if weight.dtype == STATS_DTYPE or not hasattr(weight, "grad_added_to_main_grad"):
        return d.to(weight.dtype)
    weight.main_grad.add_(d)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = True
    tied = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if tied else torch.empty_like(weight)


def keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps the gradients that the forward computed, the last two outputs, for the backward.

    They stay apart from autograd's saved tensors, which would be copied when they become gradients:
    d_weight of a large lm_head is most of the operator's memory.
    """
    ctx.set_materialize_grads(False)  # the outputs that hold gradients have none of their own
    ctx.inputs, ctx.gradients = len(inputs), [d.detach() for d in output[-2:]]
    ctx.weight = inputs[1]


def backward_of_kept_gradients(ctx: Any, g: Tensor, *_: Any) -> Any:
    """Scales the kept gradients by g, the loss's own gradient, in place."""
    if ctx.gradients is None:
        raise RuntimeError(
            "this loss gives its gradients away in its first backward: compute it anew"
        )
    gradients, ctx.gradients = ctx.gradients, None
    scaled = [d.mul_(g) if want else None for d, want in zip(gradients, ctx.needs_input_grad)]  # noqa: B905
    if scaled[1] is not None:
        scaled[1] = weight_gradient(ctx.weight, scaled[1])
    return *scaled, *[None] * (ctx.inputs - 2)


def register_on_backends(op: str, fn: Callable[..., Any]) -> None:
    """fn(backend, ...) serves `op` wherever there are row kernels."""
    for name, kernels in KERNELS.items():
        register(op, name, kernels.serves)(partial(fn, name))
