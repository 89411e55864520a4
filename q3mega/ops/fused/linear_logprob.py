"""linear_logprob on row kernels.

The gradient comes after the forward has dropped its logits, so the backward computes them once
more: four GEMMs in all (docs/operators.md: recompute).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from q3mega.ops.dispatch import own_precision
from q3mega.ops.fused.lm_head import (
    STATS_DTYPE,
    BlockedHead,
    Gradients,
    fake_gradients,
    gemm_operands,
    register_on_backends,
    row_blocks,
    schema_options,
    weight_gradient,
)


@torch.library.custom_op("q3mega::linear_logprob", mutates_args=())
def _logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    valid: int,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = BlockedHead(weight, temperature, valid, group, backend, len(hidden))
    column = head.shard_columns(targets)
    out = hidden.new_empty(3, len(hidden), dtype=STATS_DTYPE)
    for rows in row_blocks(torch.arange(len(hidden), device=hidden.device), head):
        out[:, rows] = torch.stack(head.stats(head.logits(hidden[rows]), column[rows]))
    return out[0].clone(), out[1].clone(), out[2].clone()


@_logprob.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(hidden.new_empty(len(hidden), dtype=STATS_DTYPE) for _ in range(3))  # type: ignore[return-value]


@torch.library.custom_op("q3mega::linear_logprob_backward", mutates_args=())
def _logprob_backward(
    g: Tensor, g_entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: Tensor,
    lse: Tensor, temperature: float, valid: int, group: str, backend: str,
    hidden_needs_grad: bool, weight_needs_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    active = ((g != 0) | (g_entropy != 0)).nonzero()[:, 0]
    head = BlockedHead(weight, temperature, valid, group, backend, len(active), weight_needs_grad)
    gradients, column = (
        Gradients(hidden, head, (hidden_needs_grad, weight_needs_grad)),
        head.shard_columns(targets),
    )
    for rows in row_blocks(active, head):
        h, c = hidden[rows], column[rows]
        z = head.logits(h)
        head.gradient(z, c, lse[rows], entropy[rows], g[rows], g_entropy[rows])
        gradients.add(rows, h, z)
    return gradients.reduced()


@_logprob_backward.register_fake
def _(g: Tensor, g_entropy: Tensor, hidden: Tensor, weight: Tensor, *options: Any) -> Any:
    return fake_gradients(hidden, weight, options[-2], options[-1])


def _keep_logprob(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _pull_logprob(ctx: Any, g: Tensor, g_entropy: Tensor, _: Tensor) -> Any:
    needs_grad = ctx.needs_input_grad[:2]
    with own_precision(g):
        gradients = _logprob_backward(g, g_entropy, *ctx.saved_tensors, *ctx.options, *needs_grad)
    d_hidden, d_weight = (
        d if want else None for d, want in zip(gradients, needs_grad, strict=True)
    )
    if d_weight is not None:
        d_weight = weight_gradient(ctx.saved_tensors[1], d_weight)
    return d_hidden, d_weight, *[None] * 5


_logprob.register_autograd(_pull_logprob, setup_context=_keep_logprob)


def _linear_logprob(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    valid_vocab: int | None,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    operands = *gemm_operands(backend, hidden, weight), targets
    logprob, entropy, _ = _logprob(
        *operands, temperature, *schema_options(valid_vocab, group, backend)
    )
    return logprob, entropy


register_on_backends("linear_logprob", _linear_logprob)
