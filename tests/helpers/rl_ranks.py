"""RL on a tiny model under a real axe: `python rl_ranks.py CASES`, run by test_ledger.py.

CASES is JSON: lists of [folder, steps, settings, kill], one after the other, each in a process of
its own. kill: null, or ["before" or "after", n]: with SIGKILL, around the process's nth update;
["loading", n]: when its servers have loaded weights for the nth time, and do not say so yet.
settings may name servers: {"kind": ..., "urls": [...]}.
Prints how each case ended, as JSON.
"""

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

from q3mega import device  # noqa: F401

# isort: split
import torch

from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from q3mega.algorithms.entropy_control import EntropyController
from q3mega.engine import Engine, OptimizerSpec
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync.sampler import WeightSyncedSampler
from q3mega.train import rl
from q3mega.train.log import Log
from q3mega.train.rollouts import Rollout
from q3mega.train.samples import PolicySettings
from q3mega.train.schedule import SynchronousSchedule

PROMPTS, ROLLOUTS = 4, 4


def run(folder: str, steps: int, settings: dict, kill: list | None) -> None:
    settings, root = dict(settings), Path(folder)
    replay = settings.get("routing_replay")
    shape = SHAPES["moe" if replay else "tied"]
    engine = Engine(shape, LAYOUT(), seed=3, optimizer=OptimizerSpec(lr=0.01, steps=20))
    sampler: Any = InProcessSampler(engine, TOKENIZER)
    if urls := settings.pop("urls", None):
        servers = ServerSampler(urls, TOKENIZER, kind=settings.pop("kind"))
        sampler = WeightSyncedSampler(engine, servers, root / "weights")
        loads, check = count(1), servers.server_kind.check_norms

        def checked(*given):
            if kill == ["loading", next(loads)]:
                os.kill(os.getpid(), signal.SIGKILL)
            check(*given)

        servers.server_kind.check_norms = checked
    trained, calls = engine.train_step, count(1)

    def train_step(*given):
        call = next(calls)
        if kill == ["before", call]:
            os.kill(os.getpid(), signal.SIGKILL)
        metrics = trained(*given)
        if kill == ["after", call]:
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics

    def roll_out(step: int) -> list[Rollout]:
        prompts = [[step, i, i + 1] for i in range(PROMPTS)]
        params = SamplingParams(6, n=ROLLOUTS, seed=step, routes=replay == "r3")
        sampled = sampler.generate(prompts, params)
        return [
            Rollout(p, c, group, problem=f"{step}-{group}",
                    # the last prompt of a batch never has a signal
                    reward=sum(t < 32 for t in c.tokens) / 6 if group < PROMPTS - 1 else 0.5)
            for group, (p, tries) in enumerate(zip(prompts, sampled, strict=True))
            for c in tries
        ]  # fmt: skip

    engine.train_step = train_step  # type: ignore[method-assign]
    root.mkdir(exist_ok=True)
    rl.train(
        engine,
        SynchronousSchedule(roll_out, settings.pop("staleness", 0)),
        PolicySettings(updates=2, capacity=256, max_tokens=6, **settings),
        EntropyController(0.7, 0.001, 0.02),
        prompts=lambda step: [],
        steps=steps,
        folder=root / "checkpoints",
        log=Log(root, steps),
        save_every=2,
    )
    engine.save_hf(root / "hf", {})


def forked(case: list) -> int:
    """The case in a process of its own, which need not import everything again; how it ended."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        torch.use_deterministic_algorithms(True)
        run(*case)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    print(json.dumps([forked(case) for case in json.loads(sys.argv[1])]))
