"""How many processes train, along which axes they split, and which splits a model allows."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from q3mega.config.section import Section, explain, field_names, parse_yaml, short
from q3mega.errors import UserError
from q3mega.model.sizes import Qwen3Shape

Recompute = Literal["none", "norms", "experts", "full"]


class Layout(Section):
    """How many processes train, and along which axes of megatron-core they split the work."""

    processes: PositiveInt = Field(
        description="Processes, one a GPU; data parallelism takes what the axes leave."
    )
    tensor: PositiveInt = Field(1, description="Ranks that split heads, FFN and vocabulary.")
    pipeline: PositiveInt = Field(1, description="Ranks that split the layers.")
    virtual_pipeline: PositiveInt = Field(
        1, description="Parts of the layers of one pipeline rank, interleaved."
    )
    context: PositiveInt = Field(1, description="Ranks that split each sequence.")
    expert: PositiveInt = Field(1, description="Ranks that split a mixture's experts.")
    expert_tensor: PositiveInt = Field(1, description="Ranks that split each expert.")
    sequence_parallel: bool = Field(
        False, description="Norms and residuals are split over the tensor ranks."
    )
    distributed_optimizer: bool = Field(
        True, description="Adam's state is split over the data-parallel ranks."
    )
    recompute: Recompute = Field(
        "none",
        description="What the backward pass computes again: RMSNorms, all of an expert layer, or "
        "every layer.",
    )

    def count_embedding_and_head_as_layers(self, layers: int) -> bool:
        """Whether embedding and lm_head each count as a layer, since pipelines divide only so."""
        chunks = self.pipeline * self.virtual_pipeline
        return layers % chunks > 0 and (layers + 2) % chunks == 0 and layers + 2 > chunks


def check_layout(layout: Layout, model: Qwen3Shape) -> None:
    """Raise UserError on the first rule of megatron-core that `layout` breaks for `model`."""

    def divides(field: str, divisor: int, of: str, total: int) -> None:
        if total % divisor:
            raise UserError(f"layout.{field}={divisor} does not divide {of}={total}")

    grid = "tensor * pipeline * context"
    divides(grid, layout.tensor * layout.pipeline * layout.context, "processes", layout.processes)
    divides("tensor", layout.tensor, "heads", model.heads)
    divides("tensor", layout.tensor, "kv_heads", model.kv_heads)
    divides("tensor", layout.tensor, "ffn", model.ffn)
    chunks = layout.pipeline * layout.virtual_pipeline
    if model.layers % chunks and not layout.count_embedding_and_head_as_layers(model.layers):
        raise UserError(
            f"layout.pipeline * virtual_pipeline={chunks} divides neither layers={model.layers} "
            "nor, with embedding and lm_head counted as one each, two more"
        )
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        raise UserError(
            f"layout.virtual_pipeline={layout.virtual_pipeline} needs layout.pipeline > 1"
        )
    if layout.sequence_parallel and layout.tensor == 1:
        raise UserError("layout.sequence_parallel=True needs layout.tensor > 1")
    if not model.experts:
        if layout.recompute == "experts":
            raise UserError(f"layout.recompute={layout.recompute} needs experts, this is dense")
        for field in ("expert", "expert_tensor"):
            if (ways := getattr(layout, field)) > 1:
                raise UserError(f"layout.{field}={ways} needs a model with experts, this is dense")
        return
    divides("expert", layout.expert, "experts", model.experts)
    divides("expert_tensor", layout.expert_tensor, "moe_ffn", model.moe_ffn)
    grid = "expert * expert_tensor * pipeline"
    size = layout.expert * layout.expert_tensor * layout.pipeline
    divides(grid, size, "processes", layout.processes)
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise UserError(
            f"layout.tensor={layout.tensor} of a mixture of experts needs "
            "layout.sequence_parallel=true"
        )


def launched() -> int:
    """How many processes torchrun, or who sets the same variables, has started; 1 without it.

    A pod of a training operator has RANK and WORLD_SIZE of its own, but no LOCAL_RANK.
    """
    rendezvous = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in rendezvous):
        return 1
    return int(os.environ["WORLD_SIZE"])


def layout_of(overrides: Sequence[str], processes: int) -> Layout:
    """A layout of `axis=ways` words; UserError for what is none."""
    raw: dict[str, Any] = {"processes": processes}
    for word in overrides:
        field, _, value = word.partition("=")
        raw[field] = parse_yaml(value, f"override {short(word)}")
    try:
        return Layout.model_validate(raw)
    except ValidationError as error:
        names = partial(field_names, Layout)
        raise UserError(f"layout.{explain(error.errors()[0], names)}") from None
