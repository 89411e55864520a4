"""grpo_loss on row kernels: the forward computes the gradients too, in three GEMMs.

The backward only scales them (docs/operators.md: gradient in the forward). gspo and gspo_token
compose linear_logprob instead, since a token's gradient depends on its whole sequence.
"""

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
    dual_clip: float | None, kl_coef: float, kl_estimator: str, entropy_coef: float,
    tis_cap: float | None, temperature: float, valid: int, group: str, backend: str,
    hidden_needs_grad: bool, weight_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = BlockedHead(weight, temperature, valid, group, backend, len(hidden), weight_needs_grad)
    gradients, column = (
        Gradients(hidden, head, (hidden_needs_grad, weight_needs_grad)),
        head.shard_columns(targets),
    )
    settings = Settings(
        cast(Variant, variant), (clip_low, clip_high), dual_clip, kl_coef,
        cast(Estimator, kl_estimator), entropy_coef, tis_cap,
    )  # fmt: skip
    logprobs, entropy, kl = hidden.new_zeros(3, len(hidden), dtype=STATS_DTYPE).unbind()
    loss, clipped = hidden.new_zeros(2, dtype=torch.float64).unbind()
    counts = w != 0
    learns = counts & ((advantages != 0) | bool(kl_coef or entropy_coef))
    learns &= hidden_needs_grad or weight_needs_grad
    for mask, learning in ((learns, True), (counts & ~learns, False)):
        for rows in row_blocks(mask.nonzero()[:, 0], head):
            h, c = hidden[rows], column[rows]
            z = head.logits(h)
            logprobs[rows], entropy[rows], lse = head.stats(z, c)
            token = token_terms(
                logprobs[rows], entropy[rows], advantages[rows], old[rows],
                None if ref is None else ref[rows],
                None if rollout is None else rollout[rows], settings,
            )  # fmt: skip
            weights = w[rows]
            loss += (token.loss * weights).sum(dtype=torch.float64)
            clipped += token.clipped.sum()
            kl[rows] = token.kl
            if learning:
                head.gradient(
                    z, c, lse, entropy[rows], token.g_logprob * weights, -entropy_coef * weights
                )
                gradients.add(rows, h, z)
    share = (clipped / counts.sum().clamp(min=1)).float()
    return loss.float(), logprobs.clone(), entropy.clone(), share, kl.clone(), *gradients.reduced()


@_grpo.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
    one, row = (hidden.new_empty(shape, dtype=STATS_DTYPE) for shape in ((), len(hidden)))
    return (
        one, row, torch.empty_like(row), torch.empty_like(one), torch.empty_like(row),
        *fake_gradients(hidden, weight, rest[-2], rest[-1]),
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
    if settings.variant.startswith("gspo"):  # a token's gradient hangs on its sequence: mode R
        return composed(
            hidden, weight, targets, rows, settings, temperature, sequences, valid_vocab,
            group, backend,
        )  # fmt: skip
    needs_grad = wants_gradients(hidden, weight)
    operands = (
        *gemm_operands(backend, hidden, weight), targets,
        *(None if x is None else x.detach().float() for x in rows),
    )  # fmt: skip
    variant, clip, *others = settings
    options = temperature, *schema_options(valid_vocab, group, backend)
    out = _grpo(*operands, variant, *clip, *others, *options, *needs_grad)
    return GrpoOutput(out[0], *(x.detach() for x in out[1:5]))


register_on_backends("grpo_loss", _grpo_loss)
