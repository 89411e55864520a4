"""The engine against transformers, and against itself after a resume."""

import json
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES, documents
from transformers import AutoModelForCausalLM

from q3mega.algorithms.losses import normalise, supervised
from q3mega.data.batch import pack
from q3mega.engine import Engine, OptimizerSpec, checkpoint
from q3mega.errors import UserError

SPEC = OptimizerSpec(lr=1e-2, steps=10, warmup_steps=2, decay="linear")


def logits_of(engine, documents):
    [batch] = pack(documents, 1000)
    [logits] = engine.evaluate([batch], lambda head, _: head.hidden @ head.weight.T)
    return batch, logits


@pytest.mark.parametrize("kind", SHAPES)
def test_transformers_computes_the_same_logits(kind, tmp_path):
    engine = Engine(SHAPES[kind], LAYOUT(), seed=1)
    for parameter in engine.chunks[0].parameters():  # initial norms are ones: make them matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    engine.save_hf(tmp_path, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch, ours = logits_of(engine, documents(0))
    lengths = batch.cu_seqlens.diff().tolist()
    for tokens, expected in zip(batch.tokens.split(lengths), ours.split(lengths), strict=True):
        assert torch.allclose(theirs(tokens[None]).logits[0], expected, atol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_folder_read_back_is_the_same_model(kind, tmp_path):
    engine = Engine(SHAPES[kind], LAYOUT(), seed=1)
    engine.save_hf(tmp_path, {})
    other = Engine(SHAPES[kind], LAYOUT(), seed=2)
    other.load_hf(tmp_path)
    assert torch.equal(logits_of(engine, documents(0))[1], logits_of(other, documents(0))[1])


def test_gradients_are_those_of_transformers(tmp_path):
    engine = Engine(
        SHAPES["dense"], LAYOUT(), seed=1, optimizer=OptimizerSpec(lr=1.0, steps=9, clip_grad=0.0)
    )
    engine.save_hf(tmp_path, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    samples = normalise(documents(0, n=3))
    metrics = engine.train_step(pack(samples, 1000), supervised)
    loss = 0.0
    for s in samples:
        logp = theirs(torch.tensor([s.tokens])).logits[0, :-1].log_softmax(-1)
        picked = logp.gather(1, torch.tensor(s.tokens[1:])[:, None])[:, 0]
        loss = loss - (picked * torch.tensor(s.weights[1:])).sum()
    loss.backward()
    norm = sum(p.grad.square().sum() for p in theirs.parameters()).sqrt()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [("dense", "norms"), ("dense", "full"), ("moe", "experts"), ("moe", "full")],
)
def test_recomputing_changes_nothing(kind, recompute):
    steps = []
    for choice in ("none", recompute):
        engine = Engine(SHAPES[kind], LAYOUT(recompute=choice), seed=1, optimizer=SPEC)
        assert engine.config.recompute_granularity == (
            None if choice == "none" else "full" if choice == "full" else "selective"
        )
        steps.append(
            [engine.train_step(pack(normalise(documents(s)), 200), supervised) for s in (0, 1)]
        )
    for plain, again in zip(*steps, strict=True):  # experts are counted twice: sums reordered
        assert again == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_bf16_learns_what_fp32_learns(kind, tmp_path):
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(SHAPES[kind], LAYOUT(), seed=1, optimizer=SPEC, dtype=dtype)
        batches = pack(normalise(documents(0)), 200)
        losses[dtype] = [engine.train_step(batches, supervised)["loss"] for _ in range(8)]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)
    assert losses[torch.bfloat16][-1] < 0.9 * losses[torch.bfloat16][0]
    engine.save_hf(tmp_path, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact_to_the_bit(optimizer, tmp_path, monkeypatch):
    spec = replace(SPEC, kind=optimizer, adam_lr=1e-3)

    def run(engine, steps):
        return [engine.train_step(pack(normalise(documents(s)), 200), supervised) for s in steps]

    engine = Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=spec)
    run(engine, [0, 1])
    trained, write = threading.Event(), checkpoint._Writing._write
    monkeypatch.setattr(checkpoint._Writing, "_write", lambda w: (trained.wait(60), write(w)))
    engine.save(tmp_path, 2, {"coefficient": 0.5})
    uncut = run(engine, [2, 3])  # while nothing is written yet
    assert not checkpoint.complete(tmp_path)
    trained.set()
    engine.finish_saving()
    other = Engine(SHAPES["tied"], LAYOUT(), seed=9, optimizer=spec)
    assert other.load_latest(tmp_path) == (2, {"coefficient": 0.5})
    assert run(other, [2, 3]) == uncut
    for a, b in zip(engine.chunks[0].parameters(), other.chunks[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=SPEC)
    engine.train_step(pack(normalise(documents(0)), 200), supervised)
    engine.save(tmp_path, 1, {})
    engine.finish_saving()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # bytes of any file
    try:
        with pytest.raises(UserError, match=r"step_000002.partial could not be written .*free"):
            engine.save(tmp_path, 2, {})
            engine.finish_saving()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert engine.load_latest(tmp_path)[0] == 1


@pytest.mark.dist
def test_a_disk_that_is_full_for_one_rank_ends_all_alike(torchrun, tmp_path):
    [ended] = torchrun("full_disk_ranks.py", 2, json.dumps([[str(tmp_path)]]))
    assert ended == ["refused", "refused"]
    assert not checkpoint.complete(tmp_path)


def test_a_cut_save_does_not_shadow_the_last_good_one(tmp_path):
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=SPEC)
    engine.train_step(pack(normalise(documents(0)), 200), supervised)
    engine.save(tmp_path, 1, {})
    (tmp_path / "step_000002.partial").mkdir()
    assert engine.load_latest(tmp_path) == (1, {})


def test_a_step_of_any_size_comes_after_those_before_it(tmp_path):
    """Names have six digits: as text the millionth step would be the oldest, and removed."""
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=SPEC)
    engine.train_step(pack(normalise(documents(0)), 200), supervised)
    for step in (999_950, 999_999, 1_000_000, 10_000_000):
        engine.save(tmp_path, step, {})
        engine.finish_saving()
        assert engine.load_latest(tmp_path) == (step, {})
    kept = [p.name for p in checkpoint.complete(tmp_path)]
    assert kept == ["step_1000000", "step_10000000"]


@pytest.mark.parametrize("files", ["*.distcp", "state.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, files):
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=SPEC)
    engine.train_step(pack(normalise(documents(0)), 200), supervised)
    engine.save(tmp_path, 1, {}, {"rewards": torch.arange(8.0)})
    engine.finish_saving()
    assert torch.equal(engine.load_latest(tmp_path)[1]["tensors"]["rewards"], torch.arange(8.0))
    [shard, *_] = tmp_path.glob(f"step_000001/{files}")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"step_000001 is damaged \({shard.name} is not as"):
        engine.load_latest(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 64), "damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: _widen(f), "hidden=64"),
    ],
)
def test_a_wrong_folder_is_named(damage, message, tmp_path):
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=1)
    engine.save_hf(tmp_path, {})
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        engine.load_hf(tmp_path)


def _widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
