"""Save after two steps under one layout, or load and take the third; rank 0 prints that step.

Run by test_reshard.py: `torchrun reshard.py save|load '{"tensor": 2}' moe WEIGHTS CHECKPOINTS`.
"""

import json
import sys
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from tiny import LAYOUT, SHAPES, documents, weights

from q3mega.algorithms.losses import normalise, supervised
from q3mega.engine import Engine, OptimizerSpec
from q3mega.train.supervised import shard


def main() -> None:
    what, layout, kind, initial, checkpoints = sys.argv[1:]
    torch.set_num_threads(1)
    spec = OptimizerSpec(lr=2e-3, steps=10, weight_decay=0.1, warmup_steps=2)
    engine = Engine(SHAPES[kind], LAYOUT(**json.loads(layout)), seed=3, optimizer=spec)
    engine.config.moe_aux_loss_coeff = 0.0  # depends on the order of micro-batches
    first, last = 0, 2
    if what == "load":
        step, state = engine.load_latest(Path(checkpoints))
        assert (step, state) == (2, {"position": 7})
        first, last = 2, 3
    else:
        engine.load_hf(initial)
    metrics = {}
    for step in range(first, last):
        metrics = engine.train_step(shard(normalise(documents(step)), 96), supervised)
    if what == "save":
        engine.save(Path(checkpoints), 2, {"position": 7})
    sums = weights(engine)
    if dist.get_rank() == 0:
        names = ("loss", "grad_norm", "lr")
        print(json.dumps({"steps": [[metrics[n] for n in names]], "weights": sums}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
