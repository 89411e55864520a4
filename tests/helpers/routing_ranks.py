"""Routing replay under some layouts, run by test_routing.py: `torchrun routed.py CASES`.

CASES is JSON: lists of [layout, folder of weights]. Of each: what routers choose by themselves, the
log-probabilities of a pass, and one update, all with routes that are not the routers' own.
"""

import sys

from q3mega import device  # noqa: F401

# isort: split
import torch

from helpers.tiny_models import LAYOUT, SHAPE, documents, run_cases, weights
from q3mega import ops
from q3mega.algorithms.losses import normalise, policy_gradient
from q3mega.data.batch import Batch, Sample
from q3mega.engine import Engine, OptimizerSpec, parallel
from q3mega.engine.parallel import shard_by_length
from q3mega.ops.grpo_loss import Settings as GrpoSettings

SHAPE_OF = SHAPE(tied=False, layers=4, experts=8, topk=2, moe_ffn=32, router_aux_loss_coef=0.2)
LAYERS = torch.arange(SHAPE_OF.layers).repeat_interleave(SHAPE_OF.topk)


def routes(length: int, seed: int) -> torch.Tensor:
    """(length, layers * topk): any two experts; a token in five is left to the routers."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(length, SHAPE_OF.layers, SHAPE_OF.experts, generator=generator)
    chosen = scores.topk(SHAPE_OF.topk, -1).indices.flatten(1) + 1
    free = torch.rand(length, 1, generator=generator) < 0.2
    return torch.where(free, 0, chosen).to(torch.uint8)


def samples(seed: int) -> list[Sample]:
    found = normalise(documents(seed))
    for i, sample in enumerate(found):
        sample.columns["routes"] = routes(len(sample), seed * 100 + i)
    return found


def logprobs(head, batch) -> torch.Tensor:
    return ops.linear_logprob(head.hidden, head.weight, batch.targets, tp_group=head.tp_group)[0]


def summary(batch: Batch, chosen: torch.Tensor) -> float:
    """Tells which layer and token a choice belongs to, but not its order among the top k."""
    return float((chosen.double() * (LAYERS + 10 * batch.tokens[:, None])).sum())


def case(layout: dict, folder: str) -> dict:
    spec = OptimizerSpec(lr=2e-3, steps=10)
    engine = Engine(SHAPE_OF, LAYOUT(**layout), seed=3, optimizer=spec)
    engine.load_hf(folder)
    batches = shard_by_length(samples(1), 96)
    found, chosen = engine.evaluate_routed(batches, logprobs)
    out = {
        "logprobs": sum(float((x * x).sum()) for x in found),
        "own": sum(map(summary, batches, chosen)),
        "tokens": sum(len(r) for r in chosen),
    }
    out = parallel.sum_over_data(
        {n: v / layout.get("context", 1) for n, v in out.items()}, engine.config
    )
    out["steps"] = []
    for step in range(2):
        metrics = engine.train_step(
            shard_by_length(samples(step), 96), policy_gradient(GrpoSettings(variant="dapo"))
        )
        out["steps"] += [metrics["loss"], metrics["grad_norm"]]
    return out | {"weights": weights(engine)}


if __name__ == "__main__":
    run_cases(case, sys.argv[1])
