"""linear_logprob and grpo_loss on row kernels.

`grpo_loss` knows its gradients as soon as it knows the logits, so forward and backward are one pass
of three GEMMs (docs/kernels.md: mode F); the backward only scales what the forward left.
`linear_logprob` learns its gradients later and computes the logits again (mode R, four GEMMs).
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from q3mega.ops.dispatch import own_precision
from q3mega.ops.fused.lm_head import (
    WIDE,
    Gradients,
    Head,
    blocks,
    fake_gradients,
    gemm_operands,
    keep_gradients,
    plain_options,
    pull_gradients,
    register_on_backends,
    wants_gradients,
    weight_gradient,
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
    head = Head(weight, temperature, valid, group, backend, len(hidden))
    column = head.column(targets)
    out = hidden.new_empty(3, len(hidden), dtype=WIDE)
    for rows in blocks(torch.arange(len(hidden), device=hidden.device), head):
        out[:, rows] = torch.stack(head.stats(head.logits(hidden[rows]), column[rows]))
    return out[0].clone(), out[1].clone(), out[2].clone()


@_logprob.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(hidden.new_empty(len(hidden), dtype=WIDE) for _ in range(3))  # type: ignore[return-value]


@torch.library.custom_op("q3mega::linear_logprob_backward", mutates_args=())
def _logprob_backward(
    g: Tensor, g_entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: Tensor,
    lse: Tensor, temperature: float, valid: int, group: str, backend: str,
    of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    active = ((g != 0) | (g_entropy != 0)).nonzero()[:, 0]
    head = Head(weight, temperature, valid, group, backend, len(active), of_weight)
    gradients, column = Gradients(hidden, head, (of_hidden, of_weight)), head.column(targets)
    for rows in blocks(active, head):
        h, c = hidden[rows], column[rows]
        z = head.logits(h)
        head.gradient(z, c, lse[rows], entropy[rows], g[rows], g_entropy[rows])
        gradients.add(rows, h, z)
    return gradients.done()


@_logprob_backward.register_fake
def _(g: Tensor, g_entropy: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
    return fake_gradients(hidden, weight, rest[-2], rest[-1])


def _keep_logprob(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _pull_logprob(ctx: Any, g: Tensor, g_entropy: Tensor, _: Tensor) -> Any:
    wanted = ctx.needs_input_grad[:2]
    with own_precision(g):
        found = _logprob_backward(g, g_entropy, *ctx.saved_tensors, *ctx.options, *wanted)
    d_hidden, d_weight = (d if want else None for d, want in zip(found, wanted, strict=True))
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
        *operands, temperature, *plain_options(valid_vocab, group, backend)
    )
    return logprob, entropy


@torch.library.custom_op("q3mega::grpo_loss", mutates_args=())
def _grpo(
    hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, old: Tensor, w: Tensor,
    ref: Tensor | None, rollout: Tensor | None, variant: str, clip_low: float, clip_high: float,
    dual_clip: float | None, kl_coef: float, kl_estimator: str, entropy_coef: float,
    tis_cap: float | None, temperature: float, valid: int, group: str, backend: str,
    of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = Head(weight, temperature, valid, group, backend, len(hidden), of_weight)
    gradients, column = Gradients(hidden, head, (of_hidden, of_weight)), head.column(targets)
    settings = Settings(
        cast(Variant, variant), (clip_low, clip_high), dual_clip, kl_coef,
        cast(Estimator, kl_estimator), entropy_coef, tis_cap,
    )  # fmt: skip
    logprobs, entropy, kl = hidden.new_zeros(3, len(hidden), dtype=WIDE).unbind()
    loss, clipped = hidden.new_zeros(2, dtype=torch.float64).unbind()
    counts = w != 0
    learns = counts & ((advantages != 0) | bool(kl_coef or entropy_coef))
    learns &= of_hidden or of_weight
    for mask, learning in ((learns, True), (counts & ~learns, False)):
        for rows in blocks(mask.nonzero()[:, 0], head):
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
    return loss.float(), logprobs.clone(), entropy.clone(), share, kl.clone(), *gradients.done()


@_grpo.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
    one, row = (hidden.new_empty(shape, dtype=WIDE) for shape in ((), len(hidden)))
    return (
        one, row, torch.empty_like(row), torch.empty_like(one), torch.empty_like(row),
        *fake_gradients(hidden, weight, rest[-2], rest[-1]),
    )  # fmt: skip


_grpo.register_autograd(pull_gradients, setup_context=keep_gradients)


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
    wanted = wants_gradients(hidden, weight)
    operands = (
        *gemm_operands(backend, hidden, weight), targets,
        *(None if x is None else x.detach().float() for x in rows),
    )  # fmt: skip
    variant, clip, *others = settings
    options = temperature, *plain_options(valid_vocab, group, backend)
    out = _grpo(*operands, variant, *clip, *others, *options, *wanted)
    return GrpoOutput(out[0], *(x.detach() for x in out[1:5]))


register_on_backends("linear_logprob", _linear_logprob)
register_on_backends("grpo_loss", _grpo_loss)
