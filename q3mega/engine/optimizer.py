"""Optimizer and learning-rate schedule, both megatron-core's."""

from dataclasses import dataclass
from typing import Any, Literal

from q3mega import device  # noqa: F401

# isort: split
import torch
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True)
class OptimizerSpec:
    """lr: peak (Muon's for matrices; `adam_lr` then serves embeddings and norms).

    steps: of the whole stage.
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
