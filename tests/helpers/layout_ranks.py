"""Three optimizer steps, and one that is left out, under each of some layouts.

Run by test_layouts.py: `torchrun layouts.py CASES`, a JSON list of [kind, layout, loss, wrong];
rank 0 prints losses and weights of all. Each starts from the weights that its layout draws. wrong:
each rank normalises by its own token count.
"""

import math
import sys

from q3mega import device  # noqa: F401

# isort: split
import torch

from helpers.tiny_models import LAYOUT, SHAPES, documents, run_cases, weights
from q3mega.algorithms.losses import distillation, normalise, policy_gradient, supervised
from q3mega.engine import Engine, OptimizerSpec
from q3mega.engine.parallel import shard_by_length
from q3mega.ops.grpo_loss import Settings as GrpoSettings

TEACHER = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(5))  # hidden, lm_head


def distill(head, batch):
    """Against a teacher whose hidden state is a function of the token."""
    ways, rank = (head.tp_group.size(), head.tp_group.rank()) if head.tp_group else (1, 0)
    return distillation(TEACHER[1].chunk(ways)[rank], "reverse_kl")(head, batch)


LOSSES = {
    "supervised": supervised,
    "distill": distill,
    "policy": policy_gradient(GrpoSettings(variant="dapo", clip_high=0.28, entropy_coef=0.01)),
    "gspo": policy_gradient(GrpoSettings(variant="gspo", clip_low=3e-1, clip_high=4e-1)),
}


def steps(kind: str, layout: dict, loss_name: str, wrong: bool) -> dict:
    spec = OptimizerSpec(lr=2e-3, steps=10, weight_decay=0.1)
    engine = Engine(SHAPES[kind], LAYOUT(**layout), seed=3, optimizer=spec, ids=64)
    found, skipped = [], 0.0
    for step, broken in ((0, False), (1, True), (1, False), (2, False)):
        samples = normalise(documents(step))
        if broken:
            samples[0].weights[-1] = math.nan  # the loss of one rank
        batches = shard_by_length(samples, 96)
        for batch in batches:
            batch.columns["teacher_hidden"] = TEACHER[0][batch.tokens]
            if wrong:
                batch.loss_weights /= batch.loss_weights.sum()
        metrics = engine.train_step(batches, LOSSES[loss_name])
        if broken:
            skipped += metrics["skipped"]
            continue
        names = (
            "loss",
            "grad_norm",
            *(("router_aux_loss", "expert_load") if kind == "moe" else ()),
        )
        found.append([metrics[name] for name in names])
    return {"steps": found, "skipped": skipped, "weights": weights(engine)}


if __name__ == "__main__":
    run_cases(steps, sys.argv[1])
