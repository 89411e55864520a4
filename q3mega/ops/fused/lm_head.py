"""What the lm-head operators share: a GEMM, a pass over its rows, no (N, V) logits.

One buffer of logits is filled again and again by blocks of rows: on a CPU fresh pages would cost
more than the arithmetic on them. Rows that can get no gradient never reach a gradient's GEMM.

The GEMMs are the vendor's (MKL, cuBLAS), which no kernel of ours would beat; the row kernels are a
backend's: C++ or Triton. All is registered with torch.library: fakes and autograd, so it also runs
under torch.compile.
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

# Of logits at once: 220 rows of Qwen3's vocabulary, or a quarter of d_weight's size if that is
# more: the fewer rows a block has, the more its pass over d_weight costs beside its products.
BUFFER_BYTES = 128 << 20
CPU_COLUMNS = 2048  # of logits by one product, which then stay in the cache: a tenth faster
GPU_BYTES = 1 << 30  # 1,767 rows: a GEMM that fills the card
WIDE = torch.float32  # of logits, statistics and sums, whatever the operands are


_held = threading.local()


def _scratch(like: Tensor, rows: int, columns: int, slot: int) -> Tensor:
    """(rows, columns) of what came before. A CPU thread keeps the buffer of each slot for its next
    call: the first touch of fresh pages costs more than a pass over them."""
    if like.is_cuda:
        return like.new_empty(rows, columns)
    slots = _held.__dict__.setdefault("slots", {})
    if slot not in slots or slots[slot].numel() < rows * columns:
        with torch.inference_mode(False):  # else only such calls could write to it again
            slots[slot] = _large_pages(rows * columns)
    return slots[slot][: rows * columns].view(rows, columns)


def _large_pages(size: int) -> Tensor:
    """(size,) fp32, in pages of 2 MiB where the system has them: a GEMM and a row kernel walk
    through hundreds of rows at once, each of which begins far from the last."""
    if not size:
        return torch.empty(0, dtype=WIDE)
    memory = mmap.mmap(-1, 4 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # only Linux has them, and not everywhere
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=WIDE)


class Head:
    """An lm_head (or this rank's shard) and the buffer in which its logits come and go.

    rows: the most at once, of which a block has a part. of_weight: whether its gradient is wanted,
    for which larger blocks pay. beside: a head of as many ids whose blocks this one takes too.
    """

    def __init__(
        self,
        weight: Tensor,
        temperature: float,
        valid: int,
        group: str,
        backend: str,
        rows: int,
        of_weight: bool = False,
        beside: "Head | None" = None,
    ) -> None:
        self.weight, self.temperature, self.kernels = weight, temperature, KERNELS[backend]
        self.group = _resolve_process_group(group) if group else None  # type: ignore[arg-type]
        self.first, self.stride = vocab.offset(weight, self.group), len(weight)
        whole = vocab.size(weight, self.group)
        self.valid = whole if valid < 0 else min(whole, valid)
        self.columns = min(max(self.valid - self.first, 0), self.stride)
        quarter = weight.numel() if of_weight else 0  # bytes, of fp32
        budget = GPU_BYTES if weight.is_cuda else max(BUFFER_BYTES, quarter)
        most = max(1, budget // (4 * self.stride))
        self.step: int = _even(rows, most) if beside is None else beside.step
        slot = 0 if beside is None else 1
        wide = weight.dtype == WIDE
        self.buffer = _scratch(weight, self.step, self.stride, slot) if wide else None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) fp32 of n <= step rows, in the buffer."""
        if self.buffer is not None:
            z, hidden = self.buffer[: len(hidden)], hidden / self.temperature
            width = self.stride if self.weight.is_cuda else CPU_COLUMNS
            for part, rows in zip(z.split(width, 1), self.weight.split(width), strict=True):
                torch.mm(hidden, rows.T, out=part)
            return z
        z = torch.mm(hidden, self.weight.T, out_dtype=WIDE)
        return z if self.temperature == 1 else z.div_(self.temperature)

    def column(self, ids: Tensor) -> Tensor:
        """Where this shard holds the ids; -1 where it does not."""
        vocab.check_ids(ids, self.valid)
        column = ids - self.first
        return torch.where((column >= 0) & (column < self.columns), column, -1).contiguous()

    def stats(self, z: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log p of the column, entropy, log-sum-exp), each (n,), over the whole vocabulary."""
        m, s, t, z_y = merge(self.kernels.row_stats(z, self.columns, column), self.group)
        log_mass = s.log()
        return z_y - m - log_mass, log_mass - t / s, m + log_mass

    def gradient(
        self, z: Tensor, column: Tensor, lse: Tensor, entropy: Tensor, g: Tensor, g_entropy: Tensor
    ) -> None:
        """z becomes the gradient of sum g log p + g_entropy H with respect to it."""
        lse, entropy, g, g_entropy = (x.contiguous() for x in (lse, entropy, g, g_entropy))
        self.kernels.row_gradient(
            z, self.columns, column, lse, entropy, g, g_entropy if g_entropy.any() else None
        )


class Gradients:
    """d_hidden (N, H) and d_weight (V, H), filled block by block; empty where not wanted.

    d_weight is fp32 whatever the weight is: see `weight_gradient`.
    """

    def __init__(self, hidden: Tensor, head: Head, wanted: tuple[bool, bool]) -> None:
        self.head, (self.of_hidden, self.of_weight) = head, wanted
        self.hidden = torch.zeros_like(hidden) if wanted[0] else hidden.new_empty(0)
        self.weight: Tensor | None = None  # the first block writes it: pages are touched once

    def add(self, rows: Tensor, hidden: Tensor, dz: Tensor) -> None:
        """dz (n, V): the loss's gradient with respect to hidden / temperature @ weight.T."""
        dz, t = dz.to(self.head.weight.dtype), self.head.temperature
        if self.of_hidden:
            self.hidden[rows] = (dz @ self.head.weight).div_(t)
        if not self.of_weight:
            return
        if dz.dtype == WIDE and self.weight is not None:
            self.weight.addmm_(dz.T, hidden / t)
            return
        if dz.dtype == WIDE:
            self.weight = dz.T @ (hidden / t)
        elif self.weight is None:
            self.weight = torch.mm(dz.T, hidden, out_dtype=WIDE).div_(t)
        else:
            self.weight.add_(torch.mm(dz.T, hidden, out_dtype=WIDE), alpha=1 / t)

    def add_picked(self, rows: Tensor, hidden: Tensor, dz: Tensor, places: Tensor) -> None:
        """dz (n, K): the loss's gradient with respect to hidden @ weight[places].T alone."""
        if self.of_hidden:
            d_hidden = self.head.kernels.picked_d_hidden(dz, self.head.weight, places)
            self.hidden[rows] = d_hidden.to(hidden.dtype)
        if self.of_weight:
            if self.weight is None:
                self.weight = torch.zeros_like(self.head.weight, dtype=WIDE)
            self.head.kernels.picked_d_weight(dz, hidden, places, self.weight)

    def done(self) -> tuple[Tensor, Tensor]:
        if self.head.group is not None and self.of_hidden:
            all_reduce(self.hidden, group=self.head.group)
        if not self.of_weight:
            return self.hidden, self.hidden.new_empty(0)
        if self.weight is None:
            self.weight = torch.zeros_like(self.head.weight, dtype=WIDE)
        return self.hidden, self.weight


def _even(rows: int, most: int) -> int:
    """A block's rows when `rows` are cut into the fewest blocks of at most `most`: no block is
    small, and the buffer no larger than it need be."""
    return -(-rows // max(1, -(-rows // most))) or 1


def blocks(index: Tensor, head: Head) -> Iterator[Tensor]:
    return iter(index.split(_even(len(index), head.step))) if len(index) else iter(())


def plain_options(
    valid_vocab: int | None, group: ProcessGroup | None, backend: str
) -> tuple[int, str, str]:
    return -1 if valid_vocab is None else valid_vocab, group.group_name if group else "", backend


def gemm_operands(backend: str, *pair: Tensor) -> tuple[Tensor, ...]:
    """hidden and weight as the GEMMs take them: on a CPU there is no fast half precision."""
    dtype = WIDE if backend == "cpu" else pair[0].dtype
    return tuple(x.to(dtype).contiguous() for x in pair)


def wants_gradients(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    grads = torch.is_grad_enabled()
    return grads and hidden.requires_grad, grads and weight.requires_grad


def fake_gradients(hidden: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor, Tensor]:
    of_hidden, of_weight = wanted
    return (
        torch.empty_like(hidden) if of_hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=WIDE) if of_weight else hidden.new_empty(0),
    )


def weight_gradient(weight: Tensor, d: Tensor) -> Tensor:
    """What autograd gets of d (V, H) fp32: the gradient in the weight's dtype.

    That of a half-precision weight under megatron's DistributedDataParallel goes to its fp32
    `main_grad` unrounded, and autograd gets a stand-in that its hook drops; or, from a tied
    embedding (`zero_out_wgrad`), adds to what the embedding's own gradient is.
    """
    if weight.dtype == WIDE or not hasattr(weight, "grad_added_to_main_grad"):
        return d.to(weight.dtype)
    weight.main_grad.add_(d)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = True
    tied = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if tied else torch.empty_like(weight)


def keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    """Held apart from autograd's saved tensors, which would be copied when they become gradients:
    that of a large lm_head is most of what the operator needs."""
    ctx.set_materialize_grads(False)  # the outputs that hold gradients have none of their own
    ctx.inputs, ctx.held = len(inputs), [d.detach() for d in output[-2:]]
    ctx.weight = inputs[1]


def pull_gradients(ctx: Any, g: Tensor, *_: Any) -> Any:
    if ctx.held is None:
        raise RuntimeError(
            "this loss gives its gradients away in its first backward: compute it anew"
        )
    held, ctx.held = ctx.held, None
    scaled = [d.mul_(g) if want else None for d, want in zip(held, ctx.needs_input_grad)]  # noqa: B905
    if scaled[1] is not None:
        scaled[1] = weight_gradient(ctx.weight, scaled[1])
    return *scaled, *[None] * (ctx.inputs - 2)


def register_on_backends(op: str, fn: Callable[..., Any]) -> None:
    """fn(backend, ...) serves `op` wherever there are row kernels."""
    for name, kernels in KERNELS.items():
        register(op, name, kernels.serves)(partial(fn, name))
