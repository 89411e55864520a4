"""A loss or gradient that is not finite: no weight changes, it is counted, and it has a limit."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES, documents

from q3mega.algorithms.losses import (
    distillation,
    distillation_topk,
    normalise,
    policy_gradient,
    supervised,
)
from q3mega.data.batch import Batch, pack
from q3mega.engine import Engine, OptimizerSpec, checkpoint
from q3mega.errors import UserError
from q3mega.ops.grpo_loss import Settings as GrpoSettings

SPEC = OptimizerSpec(lr=1e-2, steps=10, max_skipped=2, expert_shares="last_step")


def batches(seed: int, **column: float) -> list[Batch]:
    """column: the value of one on the last token of a document."""
    samples = normalise(documents(seed))
    for name, value in column.items():
        (samples[3].weights if name == "weight" else samples[3].columns[name])[-1] = value
    return pack(samples, 96)


def infinite_gradient(head, batch):
    """A loss that is finite where its slope is not."""
    loss, metrics = supervised(head, batch)
    return loss + (head.hidden.sum() * 0).sqrt(), metrics


def taught(name: str, row: list[float]) -> list[Batch]:
    """With a teacher's row of numbers at every token, one of which is none at a single one."""
    found = batches(1)
    for batch in found:
        batch.columns["teacher_ids"] = torch.arange(len(row)).float().repeat(len(batch), 1)
        batch.columns[name] = torch.tensor(row).repeat(len(batch), 1)
    found[0].columns[name][5, 1] = math.nan
    return found


LOSS = policy_gradient(GrpoSettings(variant="dapo"))
HIDDEN = distillation(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), "reverse_kl")
TOPK = distillation_topk("forward_kl")
BROKEN = {
    "a teacher's state": (lambda: taught("teacher_hidden", [0.5, -0.5]), HIDDEN),
    "a teacher's log-probability": (lambda: taught("teacher_logprobs", [-1.0, -2.0]), TOPK),
    "an unknown log-probability": (lambda: batches(1, old_logprobs=math.nan), LOSS),
    "an advantage that is none": (lambda: batches(1, advantages=math.nan), LOSS),
    "an infinite advantage": (lambda: batches(1, advantages=math.inf), LOSS),
    "an infinite loss": (lambda: batches(1, weight=math.inf), supervised),
    "an infinite gradient": (lambda: batches(1), infinite_gradient),
}


def state(engine: Engine) -> list[torch.Tensor]:
    found = [p.detach().clone() for p in engine.chunks[0].parameters()]
    for part in engine.optimizer.chained_optimizers:
        found += [x.clone() for s in part.optimizer.state.values() for x in s.values()]
        found += [torch.tensor(g["step"]) for g in part.optimizer.param_groups if "step" in g]
    return found


@pytest.mark.parametrize("kind", ["tied", "moe"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_step_touches_neither_weights_nor_moments(kind, optimizer, broken, caplog):
    engine = Engine(SHAPES[kind], LAYOUT(), seed=1, optimizer=replace(SPEC, kind=optimizer))
    engine.train_step(batches(0), LOSS)
    before, choices = state(engine), engine.balance and engine.balance.choices
    make, loss = BROKEN[broken]
    with caplog.at_level(logging.WARNING):
        metrics = engine.train_step(make(), loss)
    assert metrics["skipped"] == 1 and "step 2 skipped" in caplog.text
    after = state(engine)
    assert len(after) > len(list(engine.chunks[0].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert engine.balance is None or engine.balance.choices is choices
    metrics = engine.train_step(batches(1), LOSS)
    assert "skipped" not in metrics and math.isfinite(metrics["loss"])


def test_the_steps_around_it_are_those_of_a_run_without_it_and_of_a_resumed_one(tmp_path):
    engines = [Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=SPEC) for _ in range(3)]
    for engine in engines[:2]:
        engine.train_step(batches(0), LOSS)
    engines[1].train_step(batches(1, old_logprobs=math.nan), LOSS)
    engines[1].save(tmp_path, 2, {})
    engines[1].finish_saving()
    assert engines[2].load_latest(tmp_path) == (2, {})
    losses = [engine.train_step(batches(2), LOSS) for engine in engines]
    assert losses[0] == losses[1] == losses[2]
    assert [e.schedule.num_steps for e in engines] == [2, 3, 3]  # it takes its turn


def test_more_than_the_limit_in_a_row_ends_the_training():
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=SPEC)
    for _ in range(3):
        for _ in range(2):
            assert engine.train_step(batches(1, advantages=math.nan), LOSS)["skipped"]
        engine.train_step(batches(1), LOSS)
    with pytest.raises(UserError, match=r"max_skipped=2: 3 steps in a row .* loss nan.*lower lr"):
        for _ in range(3):
            engine.train_step(batches(1, advantages=math.nan), LOSS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(value, tmp_path):
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=SPEC)
    engine.train_step(batches(0), LOSS)
    engine.save_hf(tmp_path / "hf", {})
    with torch.no_grad():
        weight = engine.chunks[0].decoder.layers[1].mlp.linear_fc2.weight
        weight[3, 4] = value
    with pytest.raises(UserError, match=r"checkpoint .* would get weights that are not finite"):
        engine.save(tmp_path / "checkpoints", 1, {})
    with pytest.raises(UserError, match="hf2 would get weights that are not finite: lower lr"):
        engine.save_hf(tmp_path / "hf2", {})
    assert not (tmp_path / "hf2").exists() and not checkpoint.complete(tmp_path / "checkpoints")
    engine.load_hf(tmp_path / "hf")
    _poison(tmp_path / "hf" / "model.safetensors", value)
    with pytest.raises(UserError, match="has weights that are not finite: restore"):
        Engine(SHAPES["tied"], LAYOUT(), seed=1).load_hf(tmp_path / "hf")


def _poison(file, value):
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["model.norm.weight"][0] = value
    save_file(tensors, file, {"format": "pt"})
