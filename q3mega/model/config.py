"""A Hugging Face folder's config.json, read and written.

transformers' own classes read it: what is left out has their default, and both spellings of the
rotary parameters mean what they mean there. A field that changes the function is obeyed or refused
by name.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch

from q3mega.errors import UserError
from q3mega.io import write_json
from q3mega.model.sizes import Qwen3Shape, Yarn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KINDS = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
# field -> the values that are computed here, and what to do about another
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "start from a checkpoint with silu"),
    "attention_bias": ((False,), "start from a checkpoint without biases"),
    "attention_dropout": ((0,), "set it to 0.0, it acts in training alone"),
    "decoder_sparse_step": ((1,), "start from a checkpoint whose layers are all of experts"),
    "mlp_only_layers": (([],), "start from a checkpoint whose layers are all of experts"),
}
# fields of others' config.json that transformers does not know, but servers do
_NEVER = {
    "quantization_config": "start from the folder in bfloat16 of the same model, or dequantise it",
    "compression_config": "start from the folder in bfloat16 of the same model, or dequantise it",
    "dual_chunk_attention_config": "delete it, up to its chunk_size nothing changes, and extend "
    "the context by YaRN",
    "shared_expert_intermediate_size": "start from a mixture without shared experts",
    "n_shared_experts": "start from a mixture without shared experts",
    "num_shared_experts": "start from a mixture without shared experts",
}
_SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_YARN = {
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}  # the released


def read(folder: str | Path) -> dict[str, Any]:
    """What stands in a folder's config.json. Raises UserError where there is none."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is no Hugging Face checkpoint: it has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): download it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return raw


def shape_of(folder: str | Path) -> Qwen3Shape:
    """The shape that a Hugging Face folder's config.json declares.

    Raises UserError, by name, for a field that asks for what is not computed here.
    """
    raw, path = read(folder), Path(folder) / "config.json"
    kind = _kind(raw, path)
    config = _parsed(raw, kind, path)
    _check(config, path)
    fields: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "ffn": config.intermediate_size,
        "head_dim": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "vocab": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "rope_base": _number(config.rope_parameters, "rope_theta", path),
        "yarn": _yarn(config, path),
        "max_positions": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
    }
    if kind == "qwen3_moe" and config.num_experts:
        fields |= {
            "experts": config.num_experts,
            "topk": config.num_experts_per_tok,
            "moe_ffn": config.moe_intermediate_size,
            "norm_topk": config.norm_topk_prob,
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }
    try:
        return Qwen3Shape(**fields)
    except UserError as error:  # it knows no file
        raise UserError(f"{path}: {str(error).removeprefix('model.')}") from None


def _kind(raw: dict[str, Any], path: Path) -> str:
    """The model_type of a causal language model whose weights are not quantised."""
    kind = str(raw.get("model_type"))
    if kind not in _KINDS:
        raise UserError(
            f"{path}: model_type={kind} is not one of {', '.join(_KINDS)}: give a Qwen3"
        )
    heads = raw.get("architectures") or [_KINDS[kind]]
    if heads != [_KINDS[kind]]:
        raise UserError(
            f"{path}: architectures={heads} is no {_KINDS[kind]}: give a causal language model"
        )
    for field, remedy in _NEVER.items():
        if raw.get(field):
            raise UserError(f"{path}: {field} is not supported: {remedy}")
    return kind


def _check(config: Any, path: Path) -> None:
    for field in _SIZES:
        if getattr(config, field) < 1:
            raise UserError(f"{path}: {field}={getattr(config, field)} must be at least 1: mend it")
    for field, (values, remedy) in _ONLY.items():
        value = getattr(config, field, values[0])
        if value not in values:
            raise UserError(f"{path}: {field}={value} is not supported, {values[0]} is: {remedy}")
    _check_rope(config.rope_parameters, path)  # with what stood beside them
    _check_window(config, path)


def _parsed(raw: dict[str, Any], kind: str, path: Path) -> Any:
    """The configuration as transformers' class for this model_type reads it."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if isinstance(rope, dict):  # before the class, which asks other types for more fields
        _check_rope(rope, path)
    try:
        cls = Qwen3Config if kind == "qwen3" else Qwen3MoeConfig
        return cls.from_dict(copy.deepcopy(raw))
    except Exception as error:  # of several libraries: it names the field
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: {reason}: mend it or download it again") from None


def _check_rope(rope: dict[str, Any], path: Path) -> None:
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"{path}: rope_parameters for layers of each kind ({', '.join(rope)}) are not "
            "supported: start from a checkpoint whose layers share theirs"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(
            f"{path}: rope_type={kind} is not supported, default and yarn are: start from a "
            "checkpoint with one of them"
        )
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise UserError(
            f"{path}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported: "
            "start from a checkpoint that rotates whole heads"
        )
    known = _ROPE | (_YARN if kind == "yarn" else {"original_max_position_embeddings"})
    unknown = sorted(name for name in rope.keys() - known if rope[name] is not None)
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]}={rope[unknown[0]]} is no parameter of rope_type={kind}: set "
            "rope_type to yarn, or delete it"
            if unknown[0] in _YARN
            else f"{path}: {unknown[0]} is no parameter of rope_type={kind} that transformers "
            "knows: delete it"
        )


def _check_window(config: Any, path: Path) -> None:
    """Full attention alone is computed here: a window must be wider than any text."""
    layers = getattr(config, "layer_types", None)
    other = sorted(set(layers or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise UserError(f"{path}: layer_types={other[0]} is not supported: start from another")
    window = config.sliding_window  # None unless use_sliding_window is true
    slides = window is not None if layers is None else "sliding_attention" in layers
    if slides and (window is None or window < config.max_position_embeddings):
        raise UserError(
            f"{path}: use_sliding_window with sliding_window={window} is not supported: set "
            "use_sliding_window to false if the model was trained without, else start from another"
        )


def _yarn(config: Any, path: Path) -> Yarn | None:
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return None
    length = _number(rope, "original_max_position_embeddings", path)
    if rope["factor"] is None:
        rope["factor"] = config.max_position_embeddings / length
    factor = _number(rope, "factor", path)
    if factor < 1:
        raise UserError(f"{path}: factor={factor:g} of YaRN must be at least 1: correct it")
    given = {
        name: _number(rope, name, path)
        for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        if rope.get(name)  # none and 0 stand for the default
    }
    scale, scale_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    attention = None
    if rope.get("attention_factor") is not None:
        attention = _number(rope, "attention_factor", path)
    elif scale and scale_all:
        grown = math.log(factor)
        attention = (0.1 * scale * grown + 1) / (0.1 * scale_all * grown + 1)
    truncate = bool(rope.get("truncate", True))
    return Yarn(factor, int(length), attention, truncate=truncate, **given)


def _number(rope: dict[str, Any], field: str, path: Path) -> float:
    value = rope.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{path}: {field}={value} must be a number above 0: correct it")
    return float(value)


def declared_dtype(folder: str | Path) -> str | None:
    """Of the weights, in torch's words, as config.json has it; None: it does not say."""
    raw = read(folder)
    name = raw.get("dtype") or raw.get("torch_dtype")
    return None if name in (None, "auto") else str(name).removeprefix("torch.")


def dtype_of(folder: str | Path) -> torch.dtype | None:
    """The same, as a type that is computed in. Raises UserError for another."""
    name = declared_dtype(folder)
    if name is not None and name not in DTYPES:
        raise UserError(
            f"{folder}/config.json: dtype={name} is not float32 or bfloat16: take it through "
            "q3mega convert and back, which keeps it in float32"
        )
    return DTYPES[name] if name else None


def write(folder: Path, shape: Qwen3Shape, tokens: dict[str, int], dtype: torch.dtype) -> None:
    """config.json of a shape; tokens: eos_token_id, pad_token_id."""
    config_of(shape, tokens, dtype).save_pretrained(folder)
    raw = read(folder)
    # the spelling of transformers 4, which servers may still stand on
    rope = raw["rope_parameters"]
    old = {k: v for k, v in rope.items() if k != "rope_theta"} if shape.yarn else None
    old_spelling = {"rope_theta": rope["rope_theta"], "rope_scaling": old}
    write_json(folder / "config.json", raw | old_spelling | {"torch_dtype": raw["dtype"]})


def write_generation(folder: Path, ends: list[int], pad: int) -> None:
    """generation_config.json as the released models have it: every id that ends a text."""
    ids = {"bos_token_id": pad, "eos_token_id": ends, "pad_token_id": pad}
    write_json(folder / "generation_config.json", _SAMPLING | ids)


def config_of(shape: Qwen3Shape, tokens: dict[str, int], dtype: torch.dtype) -> Any:
    """The transformers config of a shape; tokens: eos_token_id, pad_token_id."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_base}
    if yarn := shape.yarn:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "truncate": yarn.truncate,
        }
        if yarn.attention_factor is not None:
            rope["attention_factor"] = yarn.attention_factor
    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": rope,
        "dtype": str(dtype).removeprefix("torch."),
        **tokens,
    }
    if not shape.experts:
        return Qwen3Config(architectures=[_KINDS["qwen3"]], **common)
    return Qwen3MoeConfig(
        architectures=[_KINDS["qwen3_moe"]],
        moe_intermediate_size=shape.moe_ffn,
        num_experts=shape.experts,
        num_experts_per_tok=shape.topk,
        norm_topk_prob=shape.norm_topk,
        router_aux_loss_coef=shape.router_aux_loss_coef,
        **common,
    )
