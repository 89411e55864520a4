"""config.json as it is found in the wild: what transformers makes of it, or a refusal by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from q3mega import device  # noqa: F401

# isort: split
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
from transformers.generation import GenerationConfig

from q3mega.config.layout import Layout
from q3mega.data.batch import Sample, collate
from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.model import QWEN3
from q3mega.model.config import dtype_of, shape_of, write, write_generation
from q3mega.model.sizes import Yarn

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
IDS = torch.randint(96, (80,), generator=torch.Generator().manual_seed(0))


def saved(config, folder: Path, **how) -> Path:
    """A small random model as transformers writes it, norms and routers included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(folder, **how)
    return folder


def edit(folder: Path, drop: tuple[str, ...] = (), **change) -> Path:
    path = folder / "config.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(content | change))
    return folder


def apart(folder: Path) -> float:
    """The largest difference of our logits from transformers'."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(IDS[None]).logits[0]
    engine = Engine(shape_of(folder), Layout(processes=1), seed=1)
    engine.load_hf(folder)
    batch = collate([Sample(IDS.tolist(), [0.0] * len(IDS))])
    [ours] = engine.evaluate([batch], lambda head, _: head.logits())
    return float((ours.cpu() - theirs).abs().max())


@pytest.mark.parametrize(
    ("config", "drop", "change"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}, (), {}),
        ({}, ("rope_parameters",), {"rope_theta": 1e5, "rope_scaling": {"type": "yarn", **YARN}}),
        ({}, ("rope_parameters",),
         {"rope_scaling": {"rope_type": "yarn", "attention_factor": 1.3, "beta_fast": 4, **YARN}}),
        ({}, ("rope_parameters",), {"rope_theta": 1e6, "rope_scaling": None}),
        ({}, ("rope_parameters",), {}),
        ({"head_dim": 128}, ("head_dim",), {}),
        ({"num_key_value_heads": 4}, (), {"num_key_value_heads": None}),
        ({"rms_norm_eps": 1e-2}, (), {}),
        ({}, ("tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "dtype"), {}),
        ({"use_sliding_window": False, "sliding_window": 8}, (), {}),
        ({"use_sliding_window": True, "sliding_window": 256}, (), {}),  # no text outgrows it
    ],
)  # fmt: skip
def test_a_dense_model_is_that_of_transformers(tmp_path, config, drop, change):
    assert apart(edit(saved(Qwen3Config(**COMMON | config), tmp_path), drop, **change)) < 1e-4


@pytest.mark.parametrize(
    ("config", "how", "drop", "change"),
    [
        ({}, {"save_original_format": False}, (), {}),  # stacked experts
        ({"norm_topk_prob": False}, {}, (), {}),
        ({"norm_topk_prob": False, "num_experts_per_tok": 1}, {}, (), {}),
        ({"head_dim": 8}, {}, ("head_dim",), {}),
        ({}, {}, ("num_local_experts", "num_experts"), {"num_experts": 4}),
        ({}, {}, ("num_local_experts", "num_experts"), {"num_local_experts": 4}),
    ],
)
def test_a_mixture_is_that_of_transformers(tmp_path, config, how, drop, change):
    folder = saved(Qwen3MoeConfig(**COMMON | EXPERTS | config), tmp_path, **how)
    assert apart(edit(folder, drop, **change)) < 1e-4


@pytest.mark.parametrize("theirs", [Qwen3Config, Qwen3MoeConfig])
def test_every_default_is_that_of_transformers(tmp_path, theirs):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": theirs.model_type}))
    shape, config = shape_of(tmp_path), theirs()
    fields = {
        "layers": config.num_hidden_layers, "hidden": config.hidden_size,
        "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
        "ffn": config.intermediate_size, "vocab": config.vocab_size,
        "head_dim": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "tied": config.tie_word_embeddings, "rope_base": config.rope_parameters["rope_theta"],
        "max_positions": config.max_position_embeddings, "norm_eps": config.rms_norm_eps,
        "yarn": None,
    }  # fmt: skip
    if theirs is Qwen3MoeConfig:
        fields |= {
            "experts": config.num_experts, "topk": config.num_experts_per_tok,
            "moe_ffn": config.moe_intermediate_size, "norm_topk": config.norm_topk_prob,
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }  # fmt: skip
    found = vars(shape)
    assert {name: found[name] for name in fields} == fields
    assert set(found) - set(fields) <= {
        "experts",
        "topk",
        "moe_ffn",
        "norm_topk",
        "router_aux_loss_coef",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding_window=4096"),
        ({"model_type": "qwen3_moe", "use_sliding_window": True}, "sliding_window=4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window=None"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types=linear_attention"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ({"model_type": "qwen2"}, "model_type=qwen2"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type=llama3"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type=longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": {"factor": 4.0}}, "factor=4.0 is no parameter of rope_type=default"),
        ({"rope_scaling": {"type": "yarn", "attn_factor": 2.0, **YARN}}, "attn_factor"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": "4"}}, "factor=4"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": "yarn"}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": -1.0}, "json: rope_theta=-1.0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"num_hidden_layers": "36"}, "num_hidden_layers"),
        ({"head_dim": None}, "head_dim"),
        ({"num_key_value_heads": 5}, "kv_heads=5"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 1, "norm_topk_prob": True}, "topk=1"),
    ],
)  # fmt: skip
def test_what_would_change_the_function_is_refused_by_name(tmp_path, change, message):
    content = {"model_type": "qwen3", "num_hidden_layers": 2} | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as refusal:
        shape_of(tmp_path)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_what_is_no_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json (is no JSON|holds no JSON object)"):
        shape_of(tmp_path)


@pytest.mark.parametrize("size", ["qwen3-0.6b", "qwen3-30b-a3b"])
def test_a_written_config_says_what_the_model_is(tmp_path, size):
    shape = replace(QWEN3[size], yarn=Yarn(4.0, 32_768, 1.2, 16.0, 2.0, truncate=False))
    write(tmp_path, shape, {"eos_token_id": 7, "pad_token_id": 8}, torch.bfloat16)
    assert shape_of(tmp_path) == shape and dtype_of(tmp_path) == torch.bfloat16
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["factor"] == 4.0 and config.eos_token_id == 7
    raw = json.loads((tmp_path / "config.json").read_text())
    old = {"rope_theta": 1e6, "rope_scaling": raw["rope_scaling"], "torch_dtype": "bfloat16"}
    edit(tmp_path, ("rope_parameters", *old), **old)  # what transformers 4 reads
    assert shape_of(tmp_path) == shape and dtype_of(tmp_path) == torch.bfloat16


def test_text_ends_where_the_released_models_end_it(tmp_path):
    write_generation(tmp_path, [151_645, 151_643], 151_643)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == [151_645, 151_643] and config.pad_token_id == 151_643
    found = config.do_sample, config.temperature, config.top_k, config.top_p
    assert found == (True, 0.6, 20, 0.95)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return saved(Qwen3Config(**COMMON, tie_word_embeddings=True), tmp_path_factory.mktemp("tied"))


def loaded(folder: Path) -> Engine:
    engine = Engine(shape_of(folder), Layout(processes=1), seed=1)
    engine.load_hf(folder)
    return engine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1},
         "tie_word_embeddings is true"),
        (lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)},
         "model.norm.weight is F8_E4M3"),
        (lambda t: t | {"model.layers.0.self_attn.q_proj.weight": torch.ones(60, 32)},
         r"q_proj.weight would be \(60, 32\) and must be \(64, 32\)"),
        (lambda t: t | {"model.embed_tokens.weight": torch.ones(97, 32)}, r"must be \(96, 32\)"),
        (lambda t: t | {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)},
         "1 tensors without a place"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_config_are_named(tied, tmp_path, change, message):
    (tmp_path / "config.json").write_bytes((tied / "config.json").read_bytes())
    save_file(change(load_file(tied / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        loaded(tmp_path)


def test_a_copy_of_a_tied_embedding_is_read_over(tied, tmp_path):
    (tmp_path / "config.json").write_bytes((tied / "config.json").read_bytes())
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert apart(tmp_path) < 1e-4


def test_the_single_file_comes_before_an_index(tied, tmp_path):
    """As transformers has it: a folder that was saved over has an old index beside it."""
    (tmp_path / "config.json").write_bytes((tied / "config.json").read_bytes())
    tensors = load_file(tied / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file({n: t + 1 for n, t in tensors.items()}, tmp_path / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    many = loaded(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert apart(tmp_path) < 1e-4
    one = dict(loaded(tmp_path).tensors())
    for name, tensor in many.tensors():
        assert torch.equal(tensor, one[name] + 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no model.safetensors: give"),
        ({"pytorch_model.bin": "x"}, "but pytorch_model.bin, which is not read"),
        ({"model.safetensors": "x"}, "is damaged"),
        ({"model.safetensors.index.json": "{}"}, "is no index"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "../b"}}'}, r"names ../b"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "b"}}'}, "has no b"),
    ],
)
def test_a_folder_without_readable_tensors_is_named(tied, tmp_path, files, message):
    (tmp_path / "config.json").write_bytes((tied / "config.json").read_bytes())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        loaded(tmp_path)
