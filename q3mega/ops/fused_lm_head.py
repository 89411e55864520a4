"""The lm-head operators on row kernels: a GEMM, a pass over its rows, no (N, V) logits.

One buffer of logits is filled again and again by blocks of rows: on a CPU fresh pages would cost
more than the arithmetic on them. `grpo_loss` and `distill_loss` know their gradients as soon as
they know the logits, so forward and backward are one pass of three GEMMs (KERNELS: mode F); the
backward only scales what the forward left. `linear_logprob` learns its gradients later and computes
the logits again (mode R, four GEMMs). Rows that can get no gradient never reach a gradient's GEMM.

The GEMMs are the vendor's (MKL, cuBLAS), which no kernel of ours would beat; the row kernels are a
backend's: C++ or Triton. All is registered with torch.library: fakes and autograd, so it also runs
under torch.compile.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.distributed_c10d import _resolve_process_group

from q3mega.ops import vocab
from q3mega.ops.backends import KERNELS
from q3mega.ops.dispatch import register
from q3mega.ops.distill_loss import DistillOutput, Divergence, bucket_terms, bucketed
from q3mega.ops.grpo_loss import (
    Estimator,
    GrpoOutput,
    Rows,
    Settings,
    Variant,
    composed,
    token_terms,
)
from q3mega.ops.linear_logprob import merge

BUFFER_BYTES = 160 << 20  # of logits at once: 256 rows of Qwen3's vocabulary, where dW is amortised
GPU_BYTES = 1 << 30  # 1,767 rows: a GEMM that fills the card
WIDE = torch.float32  # of logits, statistics and sums, whatever the operands are


class _Head:
    """An lm_head (or this rank's shard) and the buffer in which its logits come and go."""

    def __init__(
        self, weight: Tensor, temperature: float, valid: int, group: str, backend: str, rows: int
    ) -> None:
        self.weight, self.temperature, self.kernels = weight, temperature, KERNELS[backend]
        self.group = _resolve_process_group(group) if group else None  # type: ignore[arg-type]
        self.first, self.stride = vocab.offset(weight, self.group), len(weight)
        valid = self.first + self.stride if valid < 0 else valid
        self.columns = min(max(valid - self.first, 0), self.stride)
        budget = GPU_BYTES if weight.is_cuda else BUFFER_BYTES
        self.step = max(1, min(rows, budget // (4 * self.stride)))
        self.buffer = weight.new_empty(self.step if weight.dtype == WIDE else 0, self.stride)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) fp32 of n <= step rows, in the buffer."""
        if self.weight.dtype == WIDE:
            z = self.buffer[: len(hidden)]
            return torch.mm(hidden / self.temperature, self.weight.T, out=z)
        z = torch.mm(hidden, self.weight.T, out_dtype=WIDE)
        return z if self.temperature == 1 else z.div_(self.temperature)

    def column(self, ids: Tensor) -> Tensor:
        """Where this shard holds the ids; -1 where it does not."""
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


class _Gradients:
    """d_hidden (N, H) and d_weight (V, H), filled block by block; empty where not wanted."""

    def __init__(self, hidden: Tensor, head: _Head, wanted: tuple[bool, bool]) -> None:
        self.head, (self.of_hidden, self.of_weight) = head, wanted
        self.hidden = torch.zeros_like(hidden) if wanted[0] else hidden.new_empty(0)
        wide = torch.zeros_like(head.weight, dtype=WIDE) if wanted[1] else hidden.new_empty(0)
        self.weight = wide

    def add(self, rows: Tensor, hidden: Tensor, dz: Tensor) -> None:
        """dz (n, V): the loss's gradient with respect to hidden / temperature @ weight.T."""
        dz, t = dz.to(self.head.weight.dtype), self.head.temperature
        if self.of_hidden:
            self.hidden[rows] = (dz @ self.head.weight).div_(t)
        if self.of_weight and dz.dtype == WIDE:
            self.weight.addmm_(dz.T, hidden / t)
        elif self.of_weight:
            self.weight.add_(torch.mm(dz.T, hidden, out_dtype=WIDE), alpha=1 / t)

    def done(self) -> tuple[Tensor, Tensor]:
        if self.head.group is not None and self.of_hidden:
            all_reduce(self.hidden, group=self.head.group)
        return self.hidden, self.weight.to(self.head.weight.dtype)


def _blocks(index: Tensor, head: _Head) -> Iterator[Tensor]:
    return iter(index.split(head.step)) if len(index) else iter(())


def _options(
    valid_vocab: int | None, group: ProcessGroup | None, backend: str
) -> tuple[int, str, str]:
    return -1 if valid_vocab is None else valid_vocab, group.group_name if group else "", backend


def _operands(backend: str, *pair: Tensor) -> tuple[Tensor, ...]:
    """hidden and weight as the GEMMs take them: on a CPU there is no fast half precision."""
    dtype = WIDE if backend == "cpu" else pair[0].dtype
    return tuple(x.to(dtype).contiguous() for x in pair)


def _wanted(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    grads = torch.is_grad_enabled()
    return grads and hidden.requires_grad, grads and weight.requires_grad


# -- linear_logprob ------------------------------------------------------------------------------


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
    head = _Head(weight, temperature, valid, group, backend, len(hidden))
    column = head.column(targets)
    out = hidden.new_empty(3, len(hidden), dtype=WIDE)
    for rows in _blocks(torch.arange(len(hidden), device=hidden.device), head):
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
    head = _Head(weight, temperature, valid, group, backend, len(active))
    gradients, column = _Gradients(hidden, head, (of_hidden, of_weight)), head.column(targets)
    for rows in _blocks(active, head):
        h, c = hidden[rows], column[rows]
        z = head.logits(h)
        head.gradient(z, c, lse[rows], entropy[rows], g[rows], g_entropy[rows])
        gradients.add(rows, h, z)
    return gradients.done()


@_logprob_backward.register_fake
def _(g: Tensor, g_entropy: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
    return _fake_gradients(hidden, weight, rest[-2], rest[-1])


def _fake_gradients(hidden: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor, Tensor]:
    of_hidden, of_weight = wanted
    return (
        torch.empty_like(hidden) if of_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if of_weight else hidden.new_empty(0),
    )


def _keep_logprob(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _pull_logprob(ctx: Any, g: Tensor, g_entropy: Tensor, _: Tensor) -> Any:
    wanted = ctx.needs_input_grad[:2]
    found = _logprob_backward(g, g_entropy, *ctx.saved_tensors, *ctx.options, *wanted)
    d_hidden, d_weight = (d if want else None for d, want in zip(found, wanted, strict=True))
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
    operands = *_operands(backend, hidden, weight), targets
    logprob, entropy, _ = _logprob(*operands, temperature, *_options(valid_vocab, group, backend))
    return logprob, entropy


# -- grpo_loss -----------------------------------------------------------------------------------


@torch.library.custom_op("q3mega::grpo_loss", mutates_args=())
def _grpo(
    hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, old: Tensor, w: Tensor,
    ref: Tensor | None, rollout: Tensor | None, variant: str, clip_low: float, clip_high: float,
    dual_clip: float | None, kl_coef: float, kl_estimator: str, entropy_coef: float,
    tis_cap: float | None, temperature: float, valid: int, group: str, backend: str,
    of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = _Head(weight, temperature, valid, group, backend, len(hidden))
    gradients, column = _Gradients(hidden, head, (of_hidden, of_weight)), head.column(targets)
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
        for rows in _blocks(mask.nonzero()[:, 0], head):
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
        *_fake_gradients(hidden, weight, rest[-2], rest[-1]),
    )  # fmt: skip


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.inputs = len(inputs)
    ctx.save_for_backward(*output[-2:])


def _pull_gradients(ctx: Any, g: Tensor, *_: Any) -> Any:
    scaled = [d * g if want else None for d, want in zip(ctx.saved_tensors, ctx.needs_input_grad)]  # noqa: B905
    return *scaled, *[None] * (ctx.inputs - 2)


_grpo.register_autograd(_pull_gradients, setup_context=_keep_gradients)


def _grpo_loss(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Rows,
    settings: Settings,
    temperature: float,
    seq_ids: Tensor | None,
    valid_vocab: int | None,
    group: ProcessGroup | None,
) -> GrpoOutput:
    if settings.variant.startswith("gspo"):  # a token's gradient hangs on its sequence: mode R
        return composed(
            hidden, weight, targets, rows, settings, temperature, seq_ids, valid_vocab, group,
            backend,
        )  # fmt: skip
    wanted = _wanted(hidden, weight)
    operands = (
        *_operands(backend, hidden, weight), targets,
        *(None if x is None else x.detach().float() for x in rows),
    )  # fmt: skip
    variant, clip, *others = settings
    options = temperature, *_options(valid_vocab, group, backend)
    out = _grpo(*operands, variant, *clip, *others, *options, *wanted)
    return GrpoOutput(out[0], *(x.detach() for x in out[1:5]))


# -- distill_loss --------------------------------------------------------------------------------


@torch.library.custom_op("q3mega::distill_loss", mutates_args=())
def _distill(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, w: Tensor,
    divergence: str, beta: float, temperature: float, valid: int, group: str, backend: str,
    of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = _Head(weight, temperature, valid, group, backend, len(hidden))
    teacher = _Head(teacher_weight, temperature, valid, group, backend, len(hidden))
    gradients = _Gradients(hidden, head, (of_hidden, of_weight))
    per_token = hidden.new_zeros(len(hidden), dtype=WIDE)
    for rows in _blocks((w != 0).nonzero()[:, 0], head):
        h, t = head.logits(hidden[rows]), teacher.logits(teacher_hidden[rows])
        nowhere = torch.full_like(rows, -1)
        (_, _, lse), (_, _, lse_t) = head.stats(h, nowhere), teacher.stats(t, nowhere)
        lse, lse_t = lse.contiguous(), lse_t.contiguous()
        pair = h, t, head.columns, lse, lse_t, divergence, beta
        sums = head.kernels.divergence_sums(*pair)
        if head.group is not None:
            all_reduce(sums, group=head.group)
        first, second = sums.unbind(1)
        jsd = divergence == "jsd"
        per_token[rows] = beta * first + (1 - beta) * second if jsd else first
        if of_hidden or of_weight:
            own, g = (second if jsd else first).contiguous(), w[rows]
            head.kernels.divergence_gradient(*pair, own, g)
            gradients.add(rows, hidden[rows], h)
    return _squared(temperature, w, per_token, gradients)


def _squared(
    temperature: float, w: Tensor, per_token: Tensor, gradients: _Gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, per_token, d_hidden, d_weight), all times temperature squared."""
    per_token = per_token * temperature**2
    d_hidden, d_weight = gradients.done()
    if temperature != 1:
        d_hidden, d_weight = d_hidden.mul_(temperature**2), d_weight.mul_(temperature**2)
    return (per_token * w).sum(), per_token, d_hidden, d_weight


@_distill.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
    outs = (hidden.new_empty(shape, dtype=WIDE) for shape in ((), len(hidden)))
    return *outs, *_fake_gradients(hidden, weight, rest[-2], rest[-1])


_distill.register_autograd(_pull_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("q3mega::distill_topk", mutates_args=())
def _distill_topk(
    hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, w: Tensor, divergence: str,
    beta: float, temperature: float, valid: int, group: str, backend: str,
    of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Teacher (N, K + 1), the last of each row the rest: one bucket an id, and one for the rest.

    Outside the ids a logit matters by its mass alone.
    """
    head = _Head(weight, temperature, valid, group, backend, len(hidden))
    gradients = _Gradients(hidden, head, (of_hidden, of_weight))
    per_token, column = hidden.new_zeros(len(hidden), dtype=WIDE), head.column(ids)
    for rows in _blocks((w != 0).nonzero()[:, 0], head):
        h, c = hidden[rows], column[rows]
        z, nowhere = head.logits(h), torch.full_like(rows, -1)
        lse = head.stats(z, nowhere)[2]
        here, places = c >= 0, c.clamp(min=0)
        logits = torch.where(here, z.gather(1, places), 0.0)
        if head.group is not None:
            all_reduce(logits, group=head.group)
        row, pick = here.nonzero(as_tuple=True)
        z[row, c[row, pick]] = vocab.MASKED
        rest = head.stats(z, nowhere)[2]  # summed, not one minus the ids: see distill_loss
        student = torch.cat([logits, rest[:, None]], 1) - lse[:, None]
        per_token[rows], slope = bucket_terms(
            student, teacher[rows], cast(Divergence, divergence), beta
        )
        slope = (slope * w[rows, None]).contiguous()
        head.gradient(z, nowhere, lse, lse, -slope[:, -1], torch.zeros_like(lse))
        inside = student[:, :-1].exp() * slope[:, :-1]
        z[row, c[row, pick]] = inside[row, pick]
        gradients.add(rows, h, z)
    return _squared(temperature, w, per_token, gradients)


@torch.library.custom_op("q3mega::distill_renormalised", mutates_args=())
def _distill_renormalised(
    hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, w: Tensor, divergence: str,
    beta: float, temperature: float, group: str, backend: str,
    of_hidden: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Only the ids' own rows of the lm_head are read: no GEMM over the vocabulary."""
    head = _Head(weight, temperature, -1, group, backend, 1)
    gradients = _Gradients(hidden, head, (of_hidden, of_weight))
    per_token, column = hidden.new_zeros(len(hidden), dtype=WIDE), head.column(ids)
    step = max(1, BUFFER_BYTES // 4 // (4 * ids.shape[1] * hidden.shape[1]))
    for rows in (w != 0).nonzero()[:, 0].split(step):
        here, places = column[rows] >= 0, column[rows].clamp(min=0)
        h, picked = hidden[rows].to(WIDE) / temperature, weight[places].to(WIDE)
        logits = torch.einsum("nkh,nh->nk", picked, h) * here
        if head.group is not None:
            all_reduce(logits, group=head.group)
        student = logits.log_softmax(1)
        per_token[rows], slope = bucket_terms(
            student, teacher[rows], cast(Divergence, divergence), beta
        )
        dz = student.exp() * slope * w[rows, None] * here
        if of_hidden:
            d_hidden = torch.einsum("nk,nkh->nh", dz, picked) / temperature
            gradients.hidden[rows] = d_hidden.to(hidden.dtype)
        if of_weight:
            outer = dz[:, :, None] * h[:, None]
            gradients.weight.index_add_(0, places.flatten(), outer.flatten(0, 1))
    return _squared(temperature, w, per_token, gradients)


for _op in (_distill_topk, _distill_renormalised):

    @_op.register_fake
    def _(hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
        outs = (hidden.new_empty(shape, dtype=WIDE) for shape in ((), len(hidden)))
        return *outs, *_fake_gradients(hidden, weight, rest[-2], rest[-1])

    _op.register_autograd(_pull_gradients, setup_context=_keep_gradients)


def _distill_loss(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    divergence: str,
    beta: float,
    temperature: float,
    w: Tensor,
    tail: bool,
    valid_vocab: int | None,
    group: ProcessGroup | None,
) -> DistillOutput:
    wanted = _wanted(hidden, weight)
    student = _operands(backend, hidden, weight)
    w = w.detach().float().contiguous()
    how = w, divergence, beta, temperature
    if topk is None:
        assert teacher_hidden is not None and teacher_weight is not None
        with torch.no_grad():
            teacher = _operands(backend, teacher_hidden, teacher_weight)
        out = _distill(*student, *teacher, *how, *_options(valid_vocab, group, backend), *wanted)
    else:
        ids, logprobs = topk[0], bucketed(topk[1].detach().float(), tail)
        if tail:
            out = _distill_topk(
                *student, ids, logprobs, *how, *_options(valid_vocab, group, backend), *wanted
            )
        else:
            out = _distill_renormalised(
                *student, ids, logprobs, *how, *_options(valid_vocab, group, backend)[1:], *wanted
            )
    return DistillOutput(out[0], out[1].detach())


for _name, _kernels in KERNELS.items():
    for _op_name, _fn in (
        ("linear_logprob", _linear_logprob), ("grpo_loss", _grpo_loss),
        ("distill_loss", _distill_loss),
    ):  # fmt: skip
        register(_op_name, _name, _kernels.serves)(partial(_fn, _name))
