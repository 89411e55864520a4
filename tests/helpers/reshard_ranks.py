"""Save after two steps under each of some layouts, or load and take the third; rank 0 prints all.

Run by test_reshard.py: `torchrun reshard.py save|load CASES`, a JSON list of [kind, layout, folder
of weights, folder of checkpoints].
"""

import sys
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES, documents, run_cases, weights
from q3mega.algorithms.losses import normalise, supervised
from q3mega.engine import Engine, OptimizerSpec
from q3mega.engine.parallel import shard_by_length


def save(kind: str, layout: dict, initial: str, checkpoints: str) -> None:
    engine = build(kind, layout)
    engine.load_hf(initial)
    for step in (0, 1):
        engine.train_step(shard_by_length(normalise(documents(step)), 96), supervised)
    engine.save(Path(checkpoints), 2, {"position": 7})
    engine.finish_saving()


def load(kind: str, layout: dict, initial: str, checkpoints: str) -> dict:
    engine = build(kind, layout)
    assert engine.load_latest(Path(checkpoints)) == (2, {"position": 7})
    metrics = engine.train_step(shard_by_length(normalise(documents(2)), 96), supervised)
    return {"step": [metrics[n] for n in ("loss", "grad_norm", "lr")], "weights": weights(engine)}


def build(kind: str, layout: dict) -> Engine:
    spec = OptimizerSpec(lr=2e-3, steps=10, weight_decay=0.1, warmup_steps=2)
    engine = Engine(SHAPES[kind], LAYOUT(**layout), seed=3, optimizer=spec, ids=64)
    return engine


if __name__ == "__main__":
    run_cases({"save": save, "load": load}[sys.argv[1]], sys.argv[2])
