"""Routing replay in the loop and in the in-process sampler, on a tiny mixture of experts."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch
from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from safetensors.torch import load, save

from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.engine import Engine, OptimizerSpec
from q3mega.errors import UserError
from q3mega.io import whole_records
from q3mega.model.routing import ROUTED_EXPERTS, differing
from q3mega.rollout import Completion, SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.logprobs import routed_logprobs, token_logprobs
from q3mega.train.log import Log
from q3mega.train.rl import train
from q3mega.train.rollouts import Rollout, pack, unpack
from q3mega.train.samples import PolicySettings
from q3mega.train.schedule import SynchronousSchedule

PROMPTS = [[1, 2, 3], [4, 5], [7, 8, 9, 10, 11], [12]]
WIDTH = SHAPES["moe"].layers * SHAPES["moe"].topk


def mixture(kind: str = "moe", lr: float = 0.02) -> Engine:
    engine = Engine(SHAPES[kind], LAYOUT(), seed=3, optimizer=OptimizerSpec(lr=lr, steps=9))
    for parameter in engine.chunks[0].parameters():
        parameter.data *= 3  # so that sequences end at different lengths
    return engine


@pytest.mark.parametrize("max_batch", [512, 5])
def test_a_sampler_tells_the_routes_that_a_forced_pass_takes(max_batch: int) -> None:
    engine = mixture()
    sampler = InProcessSampler(engine, TOKENIZER, max_batch=max_batch)
    params = SamplingParams(24, n=3, seed=5, thinking_budget=4, routes=True)
    found = sampler.generate(PROMPTS, params)
    pairs = [(p, c) for p, group in zip(PROMPTS, found, strict=True) for c in group]
    assert len({len(c.tokens) for _, c in pairs}) > 3  # rows were dropped on the way
    own = routed_logprobs(engine, [(p, c.tokens) for p, c in pairs])
    for (prompt, c), (logprobs, routes) in zip(pairs, own, strict=True):
        assert c.routes.shape == (len(prompt) + len(c.tokens) - 1, WIDTH)
        assert c.routes.dtype == torch.uint8 and int(c.routes.min()) > 0
        assert differing(c.routes, routes, 2) == (0, routes.numel())
        seen = [x for x, chosen in zip(logprobs, c.mask, strict=True) if chosen]
        assert seen == pytest.approx([x for x in c.logprobs if x], abs=1e-4)
    plain = sampler.generate(PROMPTS, SamplingParams(24, n=3, seed=5, thinking_budget=4))
    assert plain == found and plain[0][0].routes is None


def test_a_dense_model_has_no_routes() -> None:
    sampler = InProcessSampler(mixture("dense"), TOKENIZER)
    with pytest.raises(UserError, match="routes=True needs a model with experts"):
        sampler.generate(PROMPTS, SamplingParams(2, routes=True))


def test_a_saved_batch_keeps_its_routes() -> None:
    routes = [torch.randint(1, 5, (n, WIDTH), dtype=torch.uint8) for n in (3, 7)]
    batch = [
        Rollout([1, 2], Completion([3] * (len(r) - 1), [0.0], [1], "stop", routes=r), 0)
        for r in routes
    ]
    batch.insert(1, Rollout([1], Completion([2], [0.0], [1], "stop"), 0))
    rows, tensors = pack({1: batch})
    found = unpack(json.loads(json.dumps(rows)), load(save(tensors)))[1]
    assert torch.equal(found[0].completion.routes, routes[0])
    assert found[1].completion.routes is None
    assert torch.equal(found[2].completion.routes, routes[1])


def learn(folder: Path, monkeypatch, foreign: bool = False, steps: int = 1, **settings):
    """(metrics, what each update was given, the engine, the rollouts) of a short run.

    foreign: the sampler says that it took other experts than it did.
    """
    engine = mixture()
    sampler = InProcessSampler(engine, TOKENIZER)
    given, drawn = [], []
    replay = settings.get("routing_replay", "none")

    def roll_out(step: int) -> list[Rollout]:
        params = SamplingParams(8, n=6, seed=step, routes=replay == "r3")
        [tries] = sampler.generate([[1, 2, 3]], params)
        for c in tries if foreign else ():
            c.routes = (c.routes + 1) % 4 + 1
        drawn.extend(tries)
        return [Rollout([1, 2, 3], c, 0, i / 3) for i, c in enumerate(tries)]

    trained = engine.train_step

    def train_step(batches, loss):
        given.append(batches)
        return trained(batches, loss)

    monkeypatch.setattr(engine, "train_step", train_step)
    folder.mkdir()
    train(
        engine,
        SynchronousSchedule(roll_out),
        PolicySettings(2, 256, 8, **settings),
        EntropyController(0.0, 0.0, 0.0),
        prompts=lambda step: [],
        steps=steps,
        folder=folder / "checkpoints",
        log=Log(folder, steps),
        save_every=9,
    )
    return whole_records(folder / "metrics.jsonl"), given, engine, drawn


@pytest.mark.parametrize("correction", [None, RolloutCorrection("tis")])
def test_r2_replays_the_routes_before_the_updates_in_all_of_them(
    tmp_path: Path, monkeypatch, correction: RolloutCorrection | None
) -> None:
    settings = {"correction": correction, "routing_replay": "r2"}
    _, given, engine, _ = learn(tmp_path / "r2", monkeypatch, **settings)
    start = mixture()
    moved = 0
    for batches in given:
        for batch in batches:
            last = batch.cu_seqlens[1:].long() - 1
            assert batch.columns[ROUTED_EXPERTS].dtype == torch.uint8
            assert not batch.columns[ROUTED_EXPERTS][last].any()
            names = {n: c for n, c in batch.columns.items() if n != ROUTED_EXPERTS}
            bare = replace(batch, columns=names)
            _, [before] = start.evaluate_routed([bare], lambda head, batch: None)
            _, [after] = engine.evaluate_routed([bare], lambda head, batch: None)
            assert differing(batch.columns[ROUTED_EXPERTS], before, 2)[0] == 0
            moved += differing(batch.columns[ROUTED_EXPERTS], after, 2)[0]
    assert len(given) == 2 and moved > 0


def test_r3_replays_the_samplers_routes_and_tells_where_the_trainer_differs(
    tmp_path: Path, monkeypatch
) -> None:
    settings = {"correction": RolloutCorrection("tis"), "routing_replay": "r3"}
    (row,), given, _, _ = learn(tmp_path / "same", monkeypatch, **settings)
    assert row["routed_experts_mismatch"] == 0 and row["logprob_mismatch"] < 1e-5
    (row,), given, _, drawn = learn(tmp_path / "other", monkeypatch, foreign=True, **settings)
    assert row["routed_experts_mismatch"] > 0.2 and row["logprob_mismatch"] > 1e-3
    replayed = [
        part.columns[ROUTED_EXPERTS][a : b - 1]
        for batches in given
        for part in batches
        for a, b in zip(part.cu_seqlens[:-1], part.cu_seqlens[1:], strict=True)
    ]
    key = sorted(r.sum().item() for r in replayed)
    assert key == sorted(c.routes.sum().item() for c in drawn) and len(key) == 6
    # under the sampler's routes, ratios are relative to the log-probabilities under them
    pairs = [([1, 2, 3], c.tokens) for c in drawn]
    with_routes = routed_logprobs(mixture(), pairs, replayed=[c.routes for c in drawn])
    free = token_logprobs(mixture(), pairs)
    old = torch.cat([p.columns["old_logprobs"] for b in given for p in b])
    expected = sorted(x for row, _ in with_routes for x in row)
    assert sorted(x for x in old.tolist() if x) == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(sorted(x for row in free for x in row), abs=1e-3)


def test_r3_needs_the_samplers_routes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(InProcessSampler, "generate", without_routes(InProcessSampler.generate))
    with pytest.raises(UserError, match="routing_replay=r3: the sampler gave no routes"):
        learn(tmp_path / "none", monkeypatch, routing_replay="r3")


def without_routes(generate):
    def call(self, prompts, params):
        return generate(self, prompts, replace(params, routes=False))

    return call


@pytest.mark.dist
def test_the_loop_is_the_same_on_two_processes(torchrun, tmp_path: Path) -> None:
    mixture().save_hf(tmp_path / "hf", {})
    tensor = {"tensor": 2, "sequence_parallel": True}
    runs = [("r2", {}), ("r3", {"expert": 2}), ("r3", tensor)]

    def case(ranks: int, replay: str, layout: dict) -> list:
        folder = tmp_path / "-".join((str(ranks), replay, *layout))
        return [{"processes": ranks, **layout}, str(tmp_path / "hf"), replay, str(folder)]

    alone = torchrun(
        "routing_replay_ranks.py", 1, json.dumps([case(1, replay, {}) for replay in ("r2", "r3")])
    )
    found = torchrun("routing_replay_ranks.py", 2, json.dumps([case(2, *run) for run in runs]))
    for rows, (replay, _) in zip(found, runs, strict=True):
        for got, want in zip(rows, alone[replay == "r3"], strict=True):
            assert got == pytest.approx(want, rel=1e-3, abs=1e-5)
            assert want["grad_norm"] > 1e-3 and ("routed_experts_mismatch" in want) == (
                replay == "r3"
            )


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_routes_of_the_batch_that_is_ahead(tmp_path: Path) -> None:
    settings = {"staleness": 1, "routing_replay": "r3"}
    plan = [("uncut", None), ("cut", ["before", 7]), ("cut", None)]
    cases = [[str(tmp_path / name), 5, settings, kill] for name, kill in plan]
    drill = Path(__file__).parents[1] / "helpers" / "rl_ranks.py"
    done = subprocess.run(
        [sys.executable, str(drill), json.dumps(cases)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, -signal.SIGKILL, 0]
    uncut, cut = ((tmp_path / name / "hf/model.safetensors").read_bytes() for name, _ in plan[:2])
    assert uncut == cut
