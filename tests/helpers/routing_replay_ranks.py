"""RL with routing replay under each of some layouts; rank 0 prints the metrics of all.

Run by test_replay.py: `torchrun replaying.py CASES`, a JSON list of [layout, folder of weights,
replay, folder to write to].
"""

import sys
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
import torch.distributed as dist

from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES, run_cases
from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.engine import Engine, OptimizerSpec, parallel
from q3mega.io import whole_records
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.train.log import Log
from q3mega.train.rl import train
from q3mega.train.rollouts import Rollout
from q3mega.train.samples import PolicySettings
from q3mega.train.schedule import SynchronousSchedule

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]


def learn(layout: dict, weights: str, replay: str, folder: str) -> list[dict]:
    """Greedy completions, so that every layout draws the same, of which some are called better."""
    spec = OptimizerSpec(lr=5e-3, steps=9)
    engine = Engine(SHAPES["moe"], LAYOUT(**layout), seed=3, optimizer=spec)
    engine.load_hf(weights)
    sampler = InProcessSampler(engine, TOKENIZER)

    def roll_out(step: int) -> list[Rollout]:
        mine = range(len(PROMPTS))[parallel.data_rank() :: parallel.data_size()]
        params = SamplingParams(8, temperature=0, n=4, seed=step, routes=replay == "r3")
        found = sampler.generate([PROMPTS[i] for i in mine], params)
        return [
            Rollout(PROMPTS[i], c, i, j / 3)
            for i, tries in zip(mine, found, strict=True)
            for j, c in enumerate(tries)
        ]

    root = Path(folder)
    root.mkdir(exist_ok=True)
    train(
        engine,
        SynchronousSchedule(roll_out),
        PolicySettings(2, 64, 8, correction=RolloutCorrection("tis"), routing_replay=replay),
        EntropyController(0.0, 0.0, 0.0),
        prompts=lambda step: [],
        steps=2,
        folder=root / "checkpoints",
        log=Log(root, 2),
        save_every=9,
    )
    dist.barrier()
    names = (
        "loss",
        "grad_norm",
        "logprob_mismatch",
        "importance_weight",
        "entropy",
        "routed_experts_mismatch",
    )
    return [{n: row[n] for n in names if n in row} for row in whole_records(root / "metrics.jsonl")]


if __name__ == "__main__":
    run_cases(learn, sys.argv[1])
