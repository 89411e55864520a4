"""The loss that balances a mixture's experts: transformers' formula over the step's documents."""

from dataclasses import replace

import pytest
import torch

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES, documents
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from q3mega.algorithms.losses import normalise, supervised
from q3mega.data.batch import Sample, pack
from q3mega.engine import Engine, OptimizerSpec

SHAPE = SHAPES["moe"]


def mixture(shares: str = "step", **layout) -> Engine:
    spec = OptimizerSpec(lr=5e-3, steps=9, clip_grad=0.0, expert_shares=shares)
    engine = Engine(SHAPE, LAYOUT(**layout), seed=1, optimizer=spec)
    for chunk in engine.chunks:
        for layer in chunk.decoder.layers:
            layer.mlp.router.weight.data *= 20  # so that experts are chosen unevenly
    engine.optimizer.reload_model_params()
    return engine


def weightless(seed: int) -> list[Sample]:
    """Documents of which nothing is learnt: all that is left is the balance."""
    return [replace(s, weights=[0.0] * len(s)) for s in documents(seed)]


def test_the_first_step_has_the_loss_and_gradient_of_transformers(tmp_path):
    engine = mixture()
    engine.save_hf(tmp_path, {})
    engine.load_hf(tmp_path)
    metrics = engine.train_step(pack(weightless(0), 96), supervised)  # in three micro-batches
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    seen = [
        theirs(torch.tensor([s.tokens]), output_router_logits=True).router_logits
        for s in documents(0)
    ]
    logits = [torch.cat(layer) for layer in zip(*seen, strict=True)]  # of all documents
    losses = [
        load_balancing_loss_func((x,), SHAPE.experts, SHAPE.topk) / SHAPE.topk for x in logits
    ]
    (SHAPE.router_aux_loss_coef * sum(losses)).backward()
    squares = [p.grad.square().sum() for p in theirs.parameters() if p.grad is not None]
    assert metrics["router_aux_loss"] == pytest.approx(float(sum(losses)) / SHAPE.layers, rel=1e-5)
    assert metrics["router_aux_loss"] > 1.02 and metrics["grad_norm"] > 1e-3
    assert metrics["grad_norm"] == pytest.approx(float(sum(squares).sqrt()), rel=1e-4)
    chosen = [x.topk(SHAPE.topk).indices.flatten().bincount(minlength=4) for x in logits]
    busiest = max(float(n.max() / n.double().mean()) for n in chosen)
    assert metrics["expert_load"] == pytest.approx(busiest, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shares", ["step", "last_step"])
def test_micro_batches_and_recomputation_make_no_difference(shares):
    runs = []
    for capacity, recompute in ((1000, "none"), (60, "none"), (60, "experts"), (60, "full")):
        engine = mixture(shares, recompute=recompute)
        steps = [engine.train_step(pack(weightless(s), capacity), supervised) for s in range(3)]
        runs.append(
            [[m[n] for n in ("grad_norm", "router_aux_loss", "expert_load")] for m in steps]
        )
    for other in runs[1:]:
        for got, want in zip(other, runs[0], strict=True):
            assert got == pytest.approx(want, rel=1e-4)


def test_fillers_are_no_tokens_of_a_step():
    steps = []
    for spare in (0, 2):
        engine, batches = mixture(), pack(weightless(0), 96)
        filled = batches + [b.as_filler() for b in batches[:spare]]
        steps += [engine.train_step(filled, supervised) for _ in range(2)]
    for plain, filled in zip(steps[:2], steps[2:], strict=True):
        assert filled == pytest.approx(plain, rel=1e-5)


def test_the_last_step_s_choices_serve_the_next_one_also_after_a_resume(tmp_path):
    def run(engine: Engine, steps: list[int]) -> list[dict[str, float]]:
        return [engine.train_step(pack(normalise(documents(s)), 96), supervised) for s in steps]

    exact, engine, other = mixture(), mixture("last_step"), mixture("last_step")
    assert run(engine, [0])[0] == run(exact, [0])[0]  # nothing came before: its own
    chosen = engine.balance.choices
    (second,) = run(engine, [1])
    assert second["router_aux_loss"] != pytest.approx(
        run(exact, [1])[0]["router_aux_loss"], rel=1e-4
    )
    assert not torch.equal(engine.balance.choices, chosen)
    engine.save(tmp_path, 2, {})
    engine.finish_saving()
    uncut = run(engine, [2, 3])
    assert other.load_latest(tmp_path) == (2, {})
    assert run(other, [2, 3]) == uncut
