"""grpo_loss on row kernels: the forward computes the gradients too, in three GEMMs.

The backward only scales them (docs/operators.md: gradient in the forward). gspo and gspo_token
compose linear_logprob instead, since a token's gradient depends on its whole sequence.
"""

from dataclasses import astuple
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

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
from q3mega.ops.grpo_loss import (
    Estimator,
    GrpoOutput,
    Rows,
    Sequences,
    Settings,
    Variant,
    composed,
    token_terms,
)


@torch.library.custom_op("q3mega::grpo_loss", mutates_args=())
def _grpo(
    hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, old: Tensor, w: Tensor,
    ref: Tensor | None, rollout: Tensor | None, variant: str, clip_low: float, clip_high: float,
    kl_coef: float, entropy_coef: float, kl_estimator: str, clip_ratio_c: float | None,
    tis_cap: float | None, temperature: float, valid: int, group: str, backend: str,
    hidden_needs_grad: bool, weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = BlockedHead(weight, temperature, valid, group, backend, len(hidden), weight_needs_grad)
    gradients = Gradients(hidden, head, (hidden_needs_grad, weight_needs_grad))
    target_columns = head.shard_columns(targets)
    settings = Settings(
        cast(Variant, variant), clip_low, clip_high, kl_coef, entropy_coef,
        cast(Estimator, kl_estimator), clip_ratio_c, tis_cap,
    )  # fmt: skip
    logprobs, entropy, kl = hidden.new_zeros(3, len(hidden), dtype=STATS_DTYPE).unbind()
    loss, clipped = hidden.new_zeros(2, dtype=torch.float64).unbind()
    active = w != 0
    learns = active & ((advantages != 0) | bool(kl_coef or entropy_coef))
    learns &= hidden_needs_grad or weight_needs_grad
    for mask, with_gradient in ((learns, True), (active & ~learns, False)):
        for block in row_blocks(mask.nonzero()[:, 0], head):
            h, columns = hidden[block], target_columns[block]
            z = head.logits(h)
            logprobs[block], entropy[block], lse = head.stats(z, columns)
            rows = Rows(
                advantages[block], old[block], w[block], None if ref is None else ref[block],
                None if rollout is None else rollout[block],
            )  # fmt: skip
            token = token_terms(logprobs[block], entropy[block], rows, settings)
            weights = rows.loss_weights
            loss += (token.loss * weights).sum(dtype=torch.float64)
            clipped += token.clipped.sum()
            kl[block] = token.kl
            if with_gradient:
                g, g_entropy = token.g_logprob * weights, -entropy_coef * weights
                head.gradient(z, columns, lse, entropy[block], g, g_entropy)
                gradients.add(block, h, z)
    clip_fraction = (clipped / active.sum().clamp(min=1)).float()
    return (
        loss.float(), logprobs.clone(), entropy.clone(), clip_fraction, kl.clone(),
        *gradients.reduced(),
    )  # fmt: skip


@_grpo.register_fake
def _(hidden: Tensor, weight: Tensor, *options: Any) -> Any:
    one, row = (hidden.new_empty(shape, dtype=STATS_DTYPE) for shape in ((), len(hidden)))
    return (
        one, row, torch.empty_like(row), torch.empty_like(one), torch.empty_like(row),
        *fake_gradients(hidden, weight, options[-2], options[-1]),
    )  # fmt: skip


_grpo.register_autograd(backward_of_kept_gradients, setup_context=keep_gradients)


def _grpo_loss(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Rows,
    settings: Settings,
    temperature: float,
    sequences: Sequences | None,
    valid_vocab: int | None,
    group: ProcessGroup | None,
) -> GrpoOutput:
    if settings.variant.startswith("gspo"):  # a token's gradient depends on its sequence
        return composed(
            hidden, weight, targets, rows, settings, temperature, sequences, valid_vocab,
            group, backend,
        )  # fmt: skip
    needs_grad = wants_gradients(hidden, weight)
    operands = (
        *gemm_operands(backend, hidden, weight), targets,
        *(None if x is None else x.detach().float() for x in rows),
    )  # fmt: skip
    options = temperature, *schema_options(valid_vocab, group, backend)
    out = _grpo(*operands, *astuple(settings), *options, *needs_grad)
    return GrpoOutput(out[0], *(x.detach() for x in out[1:5]))


register_on_backends("grpo_loss", _grpo_loss)
