"""Weights through megatron-core's format and back under other layouts, without a bit lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from q3mega.cli import main

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256,
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}  # fmt: skip
CONFIGS = {
    "tied": Qwen3Config(**COMMON, tie_word_embeddings=True),
    "untied": Qwen3Config(**COMMON, tie_word_embeddings=False),
    "moe": Qwen3MoeConfig(**COMMON, **MOE, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Folders of small random models, norms included, as transformers writes them."""
    folders = {}
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        folders[kind] = tmp_path_factory.mktemp(kind) / "hf"
        model.save_pretrained(folders[kind])
        (folders[kind] / "tokenizer.json").write_text("{}")
    return folders


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def convert(direction: str, source: Path, target: Path, ways: str, processes: int) -> str:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", "-m", "q3mega.cli", "convert", direction,
            str(source), str(target), *ways.split(), "--verify",
        ],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "into", "back"),
    [
        ("tied", "tensor=2 sequence_parallel=true", "pipeline=2"),
        ("untied", "pipeline=2 virtual_pipeline=2", "tensor=2"),
        ("moe", "expert=2", "tensor=2 expert=2 sequence_parallel=true"),
    ],
)
def test_there_and_back_is_the_same(sources, tmp_path, kind, into, back):
    mcore, hf = tmp_path / "mcore", tmp_path / "hf"
    before = tensors(sources[kind])
    for words in (("hf-to-mcore", sources[kind], mcore, into), ("mcore-to-hf", mcore, hf, back)):
        said = convert(*words, 2)
        assert "apart" in said and f"{len(before)} mapped, 0 missing, 0 left over" in said
        listed = (words[2] / "tensors.txt").read_text().splitlines()
        assert listed == [f"mapped\t{name}" for name in sorted(before)]
    after = tensors(hf)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (hf / "config.json").read_bytes() == (sources[kind] / "config.json").read_bytes()
    assert (hf / "tokenizer.json").read_text() == "{}"


def test_a_big_model_is_cut_into_files_with_an_index(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("q3mega.model.huggingface.FILE_BYTES", 20_000)
    mcore, hf = tmp_path / "mcore", tmp_path / "hf"
    assert main(["convert", "hf-to-mcore", str(sources["untied"]), str(mcore)]) == 0
    assert main(["convert", "mcore-to-hf", str(mcore), str(hf), "--verify"]) == 0
    where = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) > 3
    for name, file in where.items():
        with safe_open(hf / file, "pt") as held:
            assert name in held.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("damage", "message", "verified"),
    [
        (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)},
         "1 tensors without a place in this model (model.layers.0.self_attn.q_proj.bias)",
         "1 tensors: model.layers.0.self_attn.q_proj.bias is left over"),
        (lambda t: {n: x for n, x in t.items() if "layers.3.mlp.up" not in n}, "lacks tensor",
         "1 tensors: model.layers.3.mlp.up_proj.weight is missing"),
        (lambda t: t | {"model.norm.weight": torch.ones(31)}, "would be (31,) and must be (32,)",
         "would be (31,) and must be (32,)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(sources, tmp_path, capsys, damage, message, verified):
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_bytes((sources["untied"] / "config.json").read_bytes())
    save_file(damage(tensors(sources["untied"])), source / "model.safetensors", {"format": "pt"})
    words = ["convert", "hf-to-mcore", str(source), str(tmp_path / "mcore")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert main([*words, "--verify"]) == 2
    assert verified in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["tensors=2"], "the nearest is tensor"), (["tensor=2"], "does not divide processes=1"),
     (["tensor=0"], "layout.tensor=0 is not allowed")],
)  # fmt: skip
def test_a_wrong_layout_is_named(sources, tmp_path, capsys, words, message):
    target = str(tmp_path / "mcore")
    assert main(["convert", "hf-to-mcore", str(sources["tied"]), target, *words]) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten(sources, tmp_path, capsys):
    assert main(["convert", "hf-to-mcore", str(sources["tied"]), str(tmp_path)]) == 2
    assert "exists: choose another place" in capsys.readouterr().err
