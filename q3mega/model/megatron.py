"""Qwen3 as a megatron-core GPTModel: RMSNorm, QK-norm, GQA, SwiGLU, no biases; dense or MoE.

The readable twin is transformers' Qwen3; `tests/model` holds the two equal.
"""

from q3mega import device

# isort: split
from typing import Any

import megatron.core.models.gpt.gpt_layer_specs as gpt_specs
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from q3mega.errors import UserError
from q3mega.model.attention import AttentionState, CoreAttention, Positions
from q3mega.model.sizes import Qwen3Shape, rows_over


class RMSNorm(torch.nn.Module):
    """megatron's own torch norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., H) over its root mean square, times the weight."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _provider() -> type:
    """Whose linear layers and experts: Transformer Engine's where it runs, else megatron's own."""
    if not device.HAS_TRANSFORMER_ENGINE:
        return LocalSpecProvider
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider


def _backend() -> Any:
    class Backend(_provider()):  # type: ignore[misc]
        def layer_norm(self, *args: Any, **kwargs: Any) -> Any:
            return RMSNorm

        def core_attention(self) -> Any:
            return CoreAttention

        def fuse_layernorm_and_linear(self) -> bool:
            return False  # one set of parameter names, whoever's layers they are

    return Backend()


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    backend = _backend()
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=CoreAttention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=RMSNorm,  # under these names megatron sums their gradients over TP
            k_layernorm=RMSNorm,
        ),
    )
    mlp = gpt_specs.get_mlp_module_spec_for_backend(
        backend=backend,
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    # the keys that Transformer Engine's fused modules use: checkpoints of the two are alike
    renamed = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not config.num_moe_experts:
        renamed["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=renamed,
        ),
    )


def transformer_config(
    shape: Qwen3Shape, *, dtype: torch.dtype, fp8: bool = False, **parallel: Any
) -> TransformerConfig:
    """megatron-core's view of a shape; `parallel` holds its own layout and recompute fields.

    fp8: the products of linear layers and experts, scaled by each tensor's present maximum.
    """
    if fp8 and not device.HAS_TRANSFORMER_ENGINE:
        raise UserError(
            "fp8=true needs a GPU and Transformer Engine (transformer-engine[pytorch]): install "
            "it, or set fp8=false"
        )
    if fp8 and dtype != torch.bfloat16:
        raise UserError("fp8=true needs precision: bf16")
    low = {"fp8": "hybrid", "fp8_recipe": "tensorwise"} if fp8 else {}
    moe: dict[str, Any] = {}
    if shape.experts:
        moe = {
            "num_moe_experts": shape.experts,
            "moe_router_topk": shape.topk,
            "moe_ffn_hidden_size": shape.moe_ffn,
            "moe_router_load_balancing_type": "none",  # `routing` attaches its own, exact one
            "moe_aux_loss_coeff": shape.router_aux_loss_coef,
            "moe_router_dtype": "fp32",
            # after the choice: softmax over the chosen ones, which is norm_topk_prob
            "moe_router_pre_softmax": not shape.norm_topk,
            "moe_grouped_gemm": device.HAS_TRANSFORMER_ENGINE,
        }
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,  # `initial.draw` does, the same under every layout
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall",  # the one that takes packs of any length
        **low,
        **moe,
        **parallel,
    )


def build_model(
    shape: Qwen3Shape, config: TransformerConfig, positions: Positions, vp_stage: int | None = None
) -> GPTModel:
    """This rank's part of the model, its matrices not yet filled. `model.attention_state` is shared
    by its core attentions.
    """
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    spec = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config)] * layers, layer_norm=RMSNorm
    )
    edge = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=rows_over(shape.vocab, config.tensor_model_parallel_size),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(**edge),
        post_process=parallel_state.is_pipeline_last_stage(**edge),
        position_embedding_type="none",
        share_embeddings_and_output_weights=shape.tied,
        vp_stage=vp_stage,
    )
    model.attention_state = AttentionState(positions)
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.state = model.attention_state
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # an optimizer of their own also where no rank splits them, so that
            parameter.allreduce = False  # checkpoints are alike whether experts are split or not
    return model
