"""Run under torchrun: the asynchronous schedule on servers at URLS, into FOLDER; rank 0 prints what
it found. `async_rl_ranks.py FOLDER STALENESS KILL URL...`; KILL: the update before which rank 0
dies."""

import json
import os
import signal
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from q3mega import device  # noqa: F401

# isort: split
import torch
import torch.distributed as dist

from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.engine import Engine, OptimizerSpec
from q3mega.rollout import SamplingParams
from q3mega.rollout.logprobs import token_logprobs
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync.sampler import InterruptibleSampler, WeightSyncedSampler
from q3mega.train import rl
from q3mega.train.log import Log
from q3mega.train.rollouts import Rollout
from q3mega.train.samples import PolicySettings
from q3mega.train.schedule import AsynchronousSchedule

STEPS, UPDATES, PROMPTS, ROLLOUTS = 6, 2, 3, 4
Trained = list[tuple[int, Rollout]]


def learn(folder: Path, staleness: int, kill: int, urls: list[str]) -> dict:
    layout = LAYOUT(processes=2)
    spec = OptimizerSpec(lr=0.02, steps=UPDATES * STEPS)
    engine = Engine(SHAPES["dense"], layout, seed=5, optimizer=spec)
    servers = ServerSampler(urls, TOKENIZER, kind="sglang")
    sampler = InterruptibleSampler(WeightSyncedSampler(engine, servers, folder / "weights"))
    copies: dict[str, list[torch.Tensor]] = {}
    sampled: Trained = []
    handed, trained, calls = sampler.sync, engine.train_step, count(1)

    def sync() -> str:
        version = handed()
        copies[version] = [p.detach().clone() for p in engine.chunks[0].parameters()]
        return version

    def train_step(*given):
        if dist.get_rank() == 0 and next(calls) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.15)  # or so small a model would have learnt before a token is sampled
        return trained(*given)

    def prompts(step: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(id=f"{step}-{i}", family="low") for i in range(PROMPTS)]

    def roll_out(step: int) -> list[Rollout]:
        tokens = [[step, i, i + 1] for i in range(PROMPTS)]
        found = sampler.generate(tokens, SamplingParams(12, n=ROLLOUTS, seed=step))
        batch = [
            Rollout(p, c, group, -sum(c.tokens) / len(c.tokens), problem=f"{step}-{group}")
            for group, (p, tries) in enumerate(zip(tokens, found, strict=True))
            for c in tries
        ]
        sampled.extend((step, rollout) for rollout in batch)
        return batch

    sampler.sync, engine.train_step = sync, train_step  # type: ignore[method-assign]
    schedule = AsynchronousSchedule(sampler, roll_out, staleness)
    settings = PolicySettings(UPDATES, 256, 12, correction=RolloutCorrection("tis"))
    rl.train(
        engine, schedule, settings, EntropyController(0.0, 0.0, 0.0), prompts=prompts, steps=STEPS,
        folder=folder / "checkpoints", log=Log(folder, STEPS), save_every=2,
    )  # fmt: skip
    updates = {version: schedule.updates[version] for version in copies}
    return {
        "rollouts": [
            {"step": step, "weights": [(updates[v], n) for v, n in r.completion.weight_versions],
             "length": len(r.completion.tokens)}
            for step, r in sampled
        ],
        "apart": apart(Engine(SHAPES["dense"], layout, seed=0), copies, sampled),
    }  # fmt: skip


def apart(engine: Engine, copies: dict[str, list[torch.Tensor]], sampled: Trained) -> float:
    """The largest difference between a token's log-probability as it was sampled, which it is
    learnt from with, and by the weights whose version it carries."""
    worst = 0.0
    for version, tensors in copies.items():
        for parameter, tensor in zip(engine.chunks[0].parameters(), tensors, strict=True):
            parameter.data.copy_(tensor)
        pairs = [(r.prompt, r.completion.tokens) for _, r in sampled]
        for (_, r), own in zip(sampled, token_logprobs(engine, pairs), strict=True):
            versions = [v for v, n in r.completion.weight_versions for _ in range(n)]
            for a, b, v in zip(own, r.completion.logprobs, versions, strict=True):
                worst = max(worst, abs(a - b) if v == version else 0.0)
    return worst


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, staleness, kill, *urls = sys.argv[1:]
    found = learn(Path(folder), int(staleness), int(kill), urls)
    if dist.get_rank() == 0:
        print(json.dumps(found))
