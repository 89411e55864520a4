"""Optimizer and learning-rate schedule, both megatron-core's, and when an update is left out."""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

from q3mega import device  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from q3mega.engine import parallel
from q3mega.errors import UserError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerSpec:
    """lr: peak (Muon's for matrices; `adam_lr` then serves embeddings and norms).

    steps: of the whole stage. max_skipped: steps in a row that may be left out since their loss or
    gradient was not finite. expert_shares: the tokens whose choices balance a mixture's experts,
    see `model.balance`.
    """

    lr: float
    steps: int
    kind: Literal["adamw", "muon"] = "adamw"
    adam_lr: float | None = None
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_skipped: int = 10
    expert_shares: Literal["step", "last_step"] = "step"


def build_optimizer(
    spec: OptimizerSpec, models: list[Any], *, distributed: bool, dtype: torch.dtype
) -> tuple[Any, OptimizerParamScheduler]:
    """The optimizer over DDP-wrapped model chunks, and its schedule."""
    muon = spec.kind == "muon"
    config = OptimizerConfig(
        optimizer="muon" if muon else "adam",
        lr=spec.lr,
        min_lr=spec.min_lr,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.betas[0],
        adam_beta2=spec.betas[1],
        adam_eps=1e-8,
        clip_grad=spec.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed and not muon,
        muon_nesterov=True,
        muon_scale_mode="shape_scaling",  # lr is then Muon's own, not one borrowed from AdamW
        muon_tp_mode="duplicated",
        muon_fp32_matmul_prec="highest",  # "medium" is bf16: a CPU emulates it at a tenth of fp32
    )
    overrides = get_standard_config_overrides(config)
    if muon and spec.adam_lr is not None:
        scalar = ParamPredicate(
            name="scalar_lr",
            fn=lambda p: getattr(p, "is_embedding_or_output_parameter", False) or p.dim() != 2,
        )
        ratio = spec.adam_lr / spec.lr
        overrides[ParamKey(predicate=scalar)] = {
            "max_lr": spec.adam_lr,
            "min_lr": spec.min_lr * ratio,
        }
    optimizer = get_megatron_optimizer(
        config, models, config_overrides=overrides, use_gloo_process_groups=False
    )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=spec.lr,
        min_lr=spec.min_lr,
        lr_warmup_steps=spec.warmup_steps,
        lr_decay_steps=max(spec.steps, spec.warmup_steps + 1),
        lr_decay_style=spec.decay,
        start_wd=spec.weight_decay,
        end_wd=spec.weight_decay,
        wd_incr_steps=spec.steps,
        wd_incr_style="constant",
    )
    return optimizer, schedule


TOO_FAST = "lower lr or clip_grad, raise warmup_steps, or look for what is odd in the data"


@dataclass
class Updates:
    """The updates of a training: those whose loss or gradient is not finite are left out, though
    they take their turn in the schedule.

    optimizer: chained ones. skipped: updates in a row.
    """

    optimizer: Any
    schedule: OptimizerParamScheduler
    max_skipped: int
    skipped: int = 0

    def step(self, loss: float) -> dict[str, float]:
        """An update from the gradients that are there: `grad_norm`, `lr`, and `skipped` where it
        touches neither weights nor moments; all ranks call, and do the same.

        Raises UserError for more than `max_skipped` in a row.
        """
        taken, norm = self._step(loss)
        metrics = {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}
        if taken:
            self.skipped = 0
            return metrics
        self.skipped += 1
        how = f"loss {loss:.3g}, gradient norm {norm:.3g}"
        if self.skipped > self.max_skipped:
            raise UserError(
                f"max_skipped={self.max_skipped}: {self.skipped} steps in a row had a loss or "
                f"gradient that is not finite (last: {how}) and changed no weight; {TOO_FAST}"
            )
        if dist.get_rank() == 0:
            _LOG.warning("step %d skipped: %s", self.schedule.num_steps, how)
        return metrics | {"skipped": 1.0}

    @torch.no_grad()
    def _step(self, loss: float) -> tuple[bool, float]:
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not parallel.everywhere(math.isfinite(loss) and math.isfinite(norm)):
            return False, norm
        for part in self.optimizer.chained_optimizers:
            if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
        return self.optimizer.step_with_ready_grads(), norm
