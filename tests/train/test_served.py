"""The loop of reinforcement with servers that sample, and with wrong log-probabilities."""

import json
from types import SimpleNamespace

import pytest

from q3mega import device  # noqa: F401

# isort: split
from tiny import LAYOUT, SHAPES
from token_server import token_server

from q3mega.algorithms.entropy import EntropyController
from q3mega.engine import Engine, OptimizerSpec
from q3mega.errors import UserError
from q3mega.rollout import SamplingParams
from q3mega.rollout.servers import ServerSampler
from q3mega.rollout.synced import SyncedSampler
from q3mega.train import reinforcement
from q3mega.train.log import Log
from q3mega.train.reinforcement import PolicySettings
from q3mega.train.rollouts import Rollout
from q3mega.train.schedule import InTurn

TOKENIZER = SimpleNamespace(
    eos=63, eod=62, think_open=61, think_close=60, encode=lambda text: [50, 51, 60]
)
PROMPTS = [[1, 2, 3], [4, 5, 6]]
STEPS = 3


def learn(folder, wrong_by=0.0):
    """Rewards low tokens; returns the metrics, each step's versions, and the engine."""
    spec = OptimizerSpec(lr=0.03, steps=2 * STEPS)
    engine = Engine(SHAPES["dense"], LAYOUT(), seed=5, optimizer=spec)
    versions = []
    with token_server(Engine(SHAPES["dense"], LAYOUT(), seed=6)) as server:
        servers = ServerSampler([server.url], TOKENIZER)
        sampler = SyncedSampler(engine, servers, folder / "weights")

        def roll_out(step):
            groups = sampler.generate(PROMPTS, SamplingParams(8, n=6, seed=step))
            versions.append({v for group in groups for c in group for v, _ in c.weights})
            for c in (c for group in groups for c in group):
                c.logprobs = [p - wrong_by for p in c.logprobs]
            return [
                Rollout(PROMPTS[i], c, i, -sum(c.tokens) / len(c.tokens), "low")
                for i, group in enumerate(groups)
                for c in group
            ]

        settings = PolicySettings(updates=2, capacity=256, max_tokens=8, max_gap=1e-3)
        reinforcement.train(
            engine, InTurn(roll_out), settings, EntropyController(0.0, 0.0, 0.0), steps=STEPS,
            folder=folder / "checkpoints", log=Log(folder, STEPS), save_every=STEPS,
        )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], versions, engine


def test_every_batch_is_sampled_from_the_weights_that_it_updates(tmp_path):
    metrics, versions, engine = learn(tmp_path)
    assert [m["gap"] < 1e-5 for m in metrics] == [True] * STEPS
    assert all(len(v) == 1 for v in versions) and len(set.union(*versions)) == STEPS
    assert engine.changes == 2 * STEPS
    assert metrics[-1]["reward"] > metrics[0]["reward"]


def test_a_gap_above_the_limit_ends_the_run_before_it_is_saved(tmp_path):
    with pytest.raises(UserError, match=r"engine.max_gap=0.001: at step 1 .* 0.01 apart"):
        learn(tmp_path, wrong_by=0.01)
    assert not list((tmp_path / "checkpoints").glob("step_*"))
