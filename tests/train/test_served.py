"""The loop of reinforcement with servers that sample, and with wrong log-probabilities."""

import json
import sqlite3
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from helpers.token_server import ONE_AT_A_TIME, token_server

from q3mega.algorithms.entropy_control import EntropyController
from q3mega.engine import Engine, OptimizerSpec
from q3mega.errors import UserError
from q3mega.rollout import SamplingParams
from q3mega.rollout.servers.client import LOADING_VERSION
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync.sampler import WeightSyncedSampler
from q3mega.train import rl
from q3mega.train.ledger import FILE, Ledger
from q3mega.train.log import Log
from q3mega.train.rollouts import Rollout
from q3mega.train.samples import PolicySettings
from q3mega.train.schedule import SynchronousSchedule

PROMPTS = [[1, 2, 3], [4, 5, 6]]
STEPS = 3


def learn(folder, wrong_by=0.0, kind="vllm", faults=(None,)):
    """Rewards low tokens; returns the metrics, each step's versions, and the engine."""
    spec = OptimizerSpec(lr=0.03, steps=2 * STEPS)
    engine = Engine(SHAPES["dense"], LAYOUT(), seed=5, optimizer=spec)
    versions = []
    with ExitStack() as stack:
        urls = []
        for fault in faults:
            server = token_server(Engine(SHAPES["dense"], LAYOUT(), seed=6), kind=kind)
            state = stack.enter_context(server)
            state.fault = fault and fault(state, folder)
            urls.append(state.url)
        servers = ServerSampler(urls, TOKENIZER, kind=kind, concurrency=2)
        sampler = WeightSyncedSampler(engine, servers, folder / "weights")

        def roll_out(step):
            groups = sampler.generate(PROMPTS, SamplingParams(8, n=6, seed=step))
            versions.append({v for group in groups for c in group for v, _ in c.weight_versions})
            for c in (c for group in groups for c in group):
                c.logprobs = [p - wrong_by for p in c.logprobs]
            return [
                Rollout(PROMPTS[i], c, i, -sum(c.tokens) / len(c.tokens), "low")
                for i, group in enumerate(groups)
                for c in group
            ]

        settings = PolicySettings(updates=2, capacity=256, max_tokens=8, max_logprob_mismatch=1e-3)
        rl.train(
            engine, SynchronousSchedule(roll_out), settings,
            EntropyController(0.0, 0.0, 0.0), steps=STEPS,
            folder=folder / "checkpoints", log=Log(folder, STEPS), save_every=STEPS,
            prompts=lambda step: [],
        )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], versions, engine


def test_every_batch_is_sampled_from_the_weights_that_it_updates(tmp_path):
    metrics, versions, engine = learn(tmp_path)
    assert [m["logprob_mismatch"] < 1e-5 for m in metrics] == [True] * STEPS
    assert all(len(v) == 1 for v in versions) and len(set.union(*versions)) == STEPS
    assert engine.weight_version == 2 * STEPS
    assert metrics[-1]["reward"] > metrics[0]["reward"]


def test_a_gap_above_the_limit_ends_the_run_before_it_is_saved(tmp_path):
    with pytest.raises(
        UserError, match=r"rollout_servers.max_logprob_mismatch=0.001: at step 1 .* 0.01 apart"
    ):
        learn(tmp_path, wrong_by=0.01)
    assert not list((tmp_path / "checkpoints").glob("step_*"))


# -- one of two servers has other weights ------------------------------------------------------

LOAD = {"vllm": "/collective_rpc reload_weights", "sglang": "/update_weights_from_disk"}


def misses_an_update(server, folder):
    return lambda path, body, n: "500" if path in LOAD.values() and n == 2 else None


def comes_back_with_its_first_weights(server, folder):
    """In the middle of the second batch, and says so."""
    server.engine.save_hf(folder / "first", {})

    def fault(path, body, number):
        second = [server.paths[load] for load in LOAD.values() if server.paths[load]] == [2]
        if path == server.POSTS[0] and second and not hasattr(server, "came_back"):
            server.came_back = number
            with ONE_AT_A_TIME:
                server.engine.load_hf(folder / "first")
                server.version = "default"

    return fault


def dies(server, folder):
    return lambda path, body, n: "kill" if path == server.POSTS[0] and n == 4 else None


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The run with one good server."""
    folder = tmp_path_factory.mktemp("good")
    metrics, _, engine = learn(folder)
    engine.save_hf(folder / "hf", {})
    return folder, metrics


@pytest.mark.slow
@pytest.mark.parametrize("fault", [misses_an_update, comes_back_with_its_first_weights, dies])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_run_with_a_bad_server_is_the_run_with_a_good_one(good, tmp_path, kind, fault, caplog):
    """No token is trained with the log-probability of other weights than the batch's."""
    metrics, versions, engine = learn(tmp_path, kind=kind, faults=(fault, None))
    left_out = [r for r in caplog.records if "left out" in r.message or "did not" in r.message]
    assert left_out  # the fault was seen
    assert all(len(v) == 1 for v in versions) and len(set.union(*versions)) == STEPS
    assert all(m["logprob_mismatch"] < 1e-5 for m in metrics)
    timeless = [{**m, "seconds": 0} for m in metrics]
    assert timeless == [{**m, "seconds": 0} for m in good[1]]
    engine.save_hf(tmp_path / "hf", {})
    ours, theirs = (f / "hf" / "model.safetensors" for f in (tmp_path, good[0]))
    assert ours.read_bytes() == theirs.read_bytes()
    assert entries(tmp_path) == entries(good[0])
    balance = Ledger(tmp_path / FILE, writes=False).balance()
    assert balance.drawn == 12 * STEPS == balance.used + sum(balance.dropped.values())


def entries(folder):
    with sqlite3.connect(folder / FILE) as connection:
        return connection.execute("SELECT * FROM rollouts ORDER BY step, position").fetchall()


@pytest.mark.slow
def test_a_run_that_is_killed_while_weights_load_ends_as_one_that_was_not(tmp_path):
    with token_server(Engine(SHAPES["tied"], LAYOUT(), seed=6), kind="sglang") as server:
        how = {"kind": "sglang", "urls": [server.url]}
        whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
        cases = [[whole, 3, how, None], [cut, 3, how, ["loading", 3]], [cut, 3, how, None]]
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "helpers" / "rl_ranks.py"),
            json.dumps(cases),
        ]
        ended = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert ended == [0, -9, 0]
        assert server.version != LOADING_VERSION and not server.paused
    assert entries(tmp_path / "whole") == entries(tmp_path / "cut")
    files = [tmp_path / name / "hf" / "model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
