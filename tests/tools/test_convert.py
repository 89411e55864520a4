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

from q3mega import device  # noqa: F401

# isort: split
from q3mega.cli import main
from q3mega.config.layout import Layout
from q3mega.errors import UserError
from q3mega.model.config import shape_of
from q3mega.tools.convert import _compare

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
            f"--nproc-per-node={processes}", "-m", "q3mega", "convert", direction,
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
        lines = (words[2] / "tensors.txt").read_text().splitlines()
        assert lines == [f"mapped\t{name}" for name in sorted(before)]
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


@pytest.fixture
def in_bf16(sources, tmp_path) -> Path:
    """The untied model as the released ones are: every tensor in bfloat16."""
    return changed(sources["untied"], tmp_path / "bf16", torch.bfloat16, "bfloat16")


def changed(source: Path, folder: Path, to: torch.dtype, declared: str, only: str = "") -> Path:
    """`source` with the tensors whose names hold `only` in another precision."""
    folder.mkdir()
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": declared}))
    moved = {n: t.to(to) if only in n else t for n, t in tensors(source).items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    return folder


def there_and_back(source: Path, folder: Path) -> tuple[Path, Path]:
    mcore, hf = folder / "mcore", folder / "back"
    assert main(["convert", "hf-to-mcore", str(source), str(mcore)]) == 0
    assert main(["convert", "mcore-to-hf", str(mcore), str(hf), "--verify"]) == 0
    return mcore, hf


@pytest.mark.parametrize(
    ("to", "declared", "only", "kept"),
    [
        (torch.bfloat16, "bfloat16", "", torch.bfloat16),
        (torch.bfloat16, "float32", "", torch.bfloat16),  # the tensors count, not the config
        (torch.float32, "bfloat16", "", torch.float32),
        (torch.bfloat16, "bfloat16", "proj", torch.float32),  # norms and embedding in fp32
        (torch.float16, "float16", "", torch.float32),
    ],
)
def test_no_bit_is_lost_whatever_the_config_says(
    sources, tmp_path, capsys, to, declared, only, kept
):
    source = changed(sources["untied"], tmp_path / "hf", to, declared, only)
    _, hf = there_and_back(source, tmp_path)
    before, after = tensors(source), tensors(hf)
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {kept}
    assert all(torch.equal(before[name].to(kept), after[name]) for name in before)
    name = str(kept).removeprefix("torch.")
    assert json.loads((hf / "config.json").read_text())["dtype"] == name
    as_declared = name == declared and not only
    assert (f"kept as {name}" in capsys.readouterr().out) != as_declared


def test_bf16_logits_are_compared_in_fp32(in_bf16, tmp_path, capsys):
    """bf16 products would differ by their rounding, 1e-2 and more, which hides what is wrong."""
    words = ["convert", "hf-to-mcore", str(in_bf16), str(tmp_path / "mcore"), "--verify"]
    assert main(words) == 0
    apart = float(capsys.readouterr().out.rpartition("at most ")[2].split()[0])
    assert apart < 1e-5


def test_verify_fails_on_other_weights_and_leaves_nothing(in_bf16, tmp_path, capsys, monkeypatch):
    mcore, _ = there_and_back(in_bf16, tmp_path)
    other = changed(in_bf16, tmp_path / "other", torch.bfloat16, "bfloat16")
    weights = tensors(in_bf16)
    weights["model.norm.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"other: logits are .* apart"):
        _compare(mcore, other, shape_of(other), Layout(processes=1))
    monkeypatch.setattr("q3mega.tools.convert.NEAR", 0.0)  # below what fp32 can do
    before = sorted(tmp_path.iterdir())
    for direction, source in (("hf-to-mcore", in_bf16), ("mcore-to-hf", mcore)):
        assert main(["convert", direction, str(source), str(tmp_path / "new"), "--verify"]) == 2
        assert "apart" in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before


def test_a_conversion_that_is_refused_leaves_nothing(sources, tmp_path, capsys):
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_bytes((sources["untied"] / "config.json").read_bytes())
    weights = tensors(sources["untied"])
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert main(["convert", "hf-to-mcore", str(source), str(tmp_path / "mcore")]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.slow
def test_an_odd_vocabulary_is_filled_up_and_cut_again(tmp_path):
    """97 rows over two ranks, and over one: what comes back has 97."""
    torch.manual_seed(0)
    config = Qwen3Config(**COMMON | {"vocab_size": 97}, tie_word_embeddings=False)
    source, mcore, hf = (tmp_path / name for name in ("hf", "mcore", "back"))
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    convert("hf-to-mcore", source, mcore, "tensor=2", 2)
    assert main(["convert", "mcore-to-hf", str(mcore), str(hf), "--verify"]) == 0
    before, after = tensors(source), tensors(hf)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_is_overwritten(sources, tmp_path, capsys):
    assert main(["convert", "hf-to-mcore", str(sources["tied"]), str(tmp_path)]) == 2
    assert "exists: choose another place" in capsys.readouterr().err
