"""Routing replay: recorded and given routes, their gradient, and the same under every layout."""

import json
from dataclasses import replace

import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch
from helpers import routing_ranks
from helpers.routing_ranks import SHAPE_OF, logprobs, samples
from helpers.tiny_models import LAYOUT

from q3mega.algorithms.losses import policy_gradient
from q3mega.data.batch import collate
from q3mega.engine import Engine, OptimizerSpec
from q3mega.model.routing import differing
from q3mega.ops.grpo_loss import Settings as GrpoSettings

LAYOUTS = [
    {"expert": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"},
    {"pipeline": 2, "recompute": "experts"},
    {"context": 2},
]


@pytest.fixture(scope="module")
def results(torchrun, tmp_path_factory):
    """The result of one process, and of two under each of LAYOUTS."""
    folder = str(tmp_path_factory.mktemp("weights"))
    Engine(SHAPE_OF, LAYOUT(), seed=3).save_hf(folder, {})
    alone = routing_ranks.case({"processes": 1}, folder)
    cases = [[{"processes": 2, **layout}, folder] for layout in LAYOUTS]
    return alone, torchrun("routing_ranks.py", 2, json.dumps(cases))


@pytest.mark.dist
@pytest.mark.parametrize("case", range(len(LAYOUTS)), ids=lambda i: "-".join(LAYOUTS[i]))
def test_a_layout_replays_and_records_the_same(results, case):
    alone, found = results[0], results[1][case]
    assert (found["own"], found["tokens"]) == (alone["own"], alone["tokens"])
    assert found["logprobs"] == pytest.approx(alone["logprobs"], rel=1e-6)
    assert found["steps"] == pytest.approx(alone["steps"], rel=1e-5)
    assert found["weights"] == pytest.approx(alone["weights"], rel=1e-5)


def policy(**optimizer) -> Engine:
    engine = Engine(
        SHAPE_OF, LAYOUT(), seed=3, optimizer=OptimizerSpec(**{"lr": 5e-3, "steps": 9} | optimizer)
    )
    return engine


def test_recorded_routes_hold_while_the_weights_move():
    engine = policy()
    free = collate([replace(s, columns={**s.columns}) for s in samples(1)])
    del free.columns["routes"]
    (before,), (routes,) = engine.evaluate_routed([free], logprobs)
    held = replace(free, columns=free.columns | {"routes": routes})
    ((again,), (own,)) = engine.evaluate_routed([held], logprobs)
    torch.testing.assert_close(again, before, rtol=0, atol=1e-6)
    assert differing(routes, own, 2) == (0, len(free) * SHAPE_OF.layers * 2)
    engine.train_step([held], policy_gradient(GrpoSettings(variant="dapo")))
    (loose,), (moved,) = engine.evaluate_routed([free], logprobs)
    (tight,), _ = engine.evaluate_routed([held], logprobs)
    missed, of = differing(routes, moved, 2)
    assert 0 < missed < of / 2  # a router chooses otherwise now
    assert (tight - loose).abs().max() > 1e-4
    # what is replayed is the choice: a router that would choose all others changes nothing but
    # through its gates, and with equal gates nothing at all
    for chunk in engine.chunks:
        for layer in chunk.decoder.layers:
            layer.mlp.router.weight.data.zero_()
    (equal,), _ = engine.evaluate_routed([held], logprobs)
    for chunk in engine.chunks:
        for layer in chunk.decoder.layers:
            layer.mlp.router.weight.data.normal_(std=1e-7)
    (still,), (others,) = engine.evaluate_routed([held], logprobs)
    assert differing(routes, others, 2)[0] > of / 4
    torch.testing.assert_close(still, equal, rtol=0, atol=1e-5)


def test_routes_of_one_engine_are_not_those_of_another():
    """A judge or a reference policy in the same process keeps its own."""
    engine, other = policy(), policy()
    batch = collate(samples(1))
    free = replace(batch, columns={})
    (want,) = other.evaluate([free], logprobs)
    with engine.routing.replaying(batch.columns["routes"]):
        (found,) = other.evaluate([free], logprobs)
    assert torch.equal(found, want)
    assert not torch.allclose(engine.evaluate([batch], logprobs)[0], want, atol=1e-3)


def test_the_gradient_is_that_of_the_replayed_choice_in_float64():
    """Of the router and an expert, against an independent mixture of dense experts."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    engine = policy()
    layer: MoELayer = engine.chunks[0].decoder.layers[0].mlp
    layer.eval()
    x = torch.randn(12, 1, SHAPE_OF.hidden, generator=torch.Generator().manual_seed(0))
    routes = torch.stack([torch.randperm(8)[:2] + 1 for _ in range(12)])
    routes[3:5] = 0
    weight = layer.router.weight
    for expert in layer.experts.local_experts:
        for parameter in expert.parameters():
            parameter.data *= 20  # away from zero
    every_layer = torch.zeros(12, SHAPE_OF.layers, 2, dtype=torch.uint8)
    every_layer[:, 0] = routes
    with engine.routing.replaying(every_layer.flatten(1)):
        out, _ = layer(x)
    (found,) = torch.autograd.grad(out.square().sum(), weight)

    exact = weight.detach().double().requires_grad_()
    rows = x[:, 0].double()
    logits = rows @ exact.T
    own = logits.topk(2).indices
    chosen = torch.where(routes > 0, routes - 1, own)
    assert (chosen.sort().values != own.sort().values).any(1).sum() >= 6
    gates = logits.gather(1, chosen).softmax(-1)
    dense = []
    for expert in layer.experts.local_experts:
        gate, up = (rows @ expert.linear_fc1.weight.double().T).chunk(2, -1)
        dense.append((torch.nn.functional.silu(gate) * up) @ expert.linear_fc2.weight.double().T)
    each = torch.stack(dense, 1).gather(1, chosen[..., None].expand(-1, -1, SHAPE_OF.hidden))
    total = (gates[..., None] * each.detach()).sum(1)
    torch.testing.assert_close(out[:, 0].double(), total, rtol=1e-4, atol=1e-6)
    (want,) = torch.autograd.grad(total.square().sum(), exact)
    assert float(want.abs().max()) > 1e-3
    torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
