"""How rollouts become updates: advantages, corrections, temperature; batches saved."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega import device  # noqa: F401

# isort: split
from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from safetensors.torch import load, save

from q3mega.algorithms.advantages import group_advantages
from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.engine import Engine, OptimizerSpec
from q3mega.io import whole_records
from q3mega.rollout import Completion, SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.train.ledger import FILE, Ledger
from q3mega.train.log import Log
from q3mega.train.rl import train
from q3mega.train.rollouts import Batches, Rollout, pack, unpack
from q3mega.train.samples import PolicySettings, compute_advantages
from q3mega.train.schedule import SynchronousSchedule

ids = st.integers(0, 2**31 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    tokens = draw(st.lists(ids, min_size=1, max_size=4))
    n = len(tokens)
    column = st.lists(finite, min_size=n, max_size=n)
    mask = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    end = draw(st.sampled_from(["stop", "length"]))
    weights = st.lists(st.tuples(st.text(), st.integers(1, 9)), max_size=2)
    return Rollout(
        prompt=draw(st.lists(ids, max_size=3)),
        completion=Completion(tokens, draw(column), mask, end, draw(weights)),
        group=draw(st.integers(0, 9)),
        reward=draw(st.none() | finite),
        task=draw(st.text()),
        reason=draw(st.text()),
        parts=draw(st.dictionaries(st.text(), finite, max_size=2)),
        problem=draw(st.text()),
        text=draw(st.text()),
        versions=draw(st.lists(st.integers(0), max_size=2)),
    )


@given(st.dictionaries(st.integers(1, 9), st.lists(rollouts(), min_size=1, max_size=3), max_size=3))
def test_batches_come_back_from_json_and_safetensors_as_they_were(batches: Batches) -> None:
    rows, tensors = pack(batches)
    assert unpack(json.loads(json.dumps(rows)), load(save(tensors))) == batches


def sized(length: int, reward: float, end: str = "stop") -> Rollout:
    completion = Completion([1] * length, [-1.0] * length, [1] * length, end)
    return Rollout([9], completion, 0, reward)


def test_over_long_completions_lose_reward_before_the_advantages() -> None:
    batch = [sized(80, 1.0), sized(90, 1.0), sized(100, 1.0, "length"), sized(40, 0.0)]
    kept, dropped = compute_advantages(batch, PolicySettings(1, 256, 100, overlong="penalty"))
    expected = group_advantages([1.0, 0.5, 0.0, 0.0])
    assert [kept[i].columns["advantages"][-1] for i in range(4)] == expected and not dropped


def test_an_episode_is_as_long_as_its_longest_turn() -> None:
    turns = [1] * 60 + [0] * 30 + [1] * 90 + [0] * 9 + [1] * 5
    episode = Rollout([9], Completion([1] * 194, [-1.0] * 194, turns, "stop"), 0, 1.0)
    batch = [episode, sized(90, 1.0), sized(40, 0.9)]
    kept, _ = compute_advantages(batch, PolicySettings(1, 256, 100, overlong="penalty"))
    advantages = [kept[i].columns["advantages"][-1] for i in range(3)]
    assert advantages == group_advantages([0.5, 0.5, 0.9])


def test_truncated_completions_carry_no_loss_but_count_in_the_baseline() -> None:
    batch = [sized(8, 1.0), sized(8, 0.0, "length"), sized(8, 0.0)]
    kept, dropped = compute_advantages(batch, PolicySettings(1, 256, 8, overlong="mask"))
    expected = group_advantages([1.0, 0.0, 0.0])
    assert {i: s.columns["advantages"][-1] for i, s in kept.items()} == {
        0: expected[0], 2: expected[2],
    }  # fmt: skip
    assert dropped == {1: "over-long"}


def test_what_cannot_be_judged_is_no_part_of_its_group() -> None:
    refused = replace(sized(8, 0.0), reward=None, reason="the judge\nrefused")
    batch = [sized(8, 1.0), refused, sized(8, 0.0), sized(8, 0.0)]
    batch += [replace(refused, group=1), replace(sized(8, 1.0), group=1)]
    batch += [replace(refused, group=2)] * 2
    kept, dropped = compute_advantages(batch, PolicySettings(1, 256, 8))
    advantages = [kept[i].columns["advantages"][-1] for i in (0, 2, 3)]
    assert advantages == group_advantages([1.0, 0.0, 0.0])
    assert dropped == dict.fromkeys((1, 4, 6, 7), "unjudged: the judge refused") | {
        5: "equal rewards"
    }


def first_step(
    folder: Path,
    shift: float,
    correction: RolloutCorrection | None,
    temperature: float = 1.0,
    rewards: Sequence[float | None] = (0, 1 / 3, 2 / 3, 1),
) -> dict[str, float]:
    """The record of one update whose sampler is wrong by `shift` nats on every token."""
    spec = OptimizerSpec(lr=1e-3, steps=4, clip_grad=0.0)
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=3, optimizer=spec)
    for parameter in engine.chunks[0].parameters():
        parameter.data *= 2  # away from uniform, where every temperature is the same
    sampler = InProcessSampler(engine, TOKENIZER)

    def roll_out(step: int) -> list[Rollout]:
        params = SamplingParams(8, temperature, n=4, seed=step)
        [tries] = sampler.generate([[1, 2, 3]], params)
        for c in tries:
            c.logprobs = [x + shift for x in c.logprobs]
        pairs = zip(tries, rewards, strict=True)
        return [Rollout([1, 2, 3], c, 0, r, reason="no answer") for c, r in pairs]

    folder.mkdir()
    train(
        engine,
        SynchronousSchedule(roll_out),
        PolicySettings(1, 256, 8, correction=correction, temperature=temperature),
        EntropyController(0.0, 0.0, 0.0),
        prompts=lambda step: [],
        steps=1,
        folder=folder / "checkpoints",
        log=Log(folder, 1),
        save_every=9,
    )
    return whole_records(folder / "metrics.jsonl")[0]


@pytest.mark.parametrize(
    ("kind", "shift", "weight"),
    [("tis", -0.3, math.exp(0.3)), ("tis", -1.2, 2.0), ("mis", -0.3, math.exp(0.3)),
     ("mis", 0.4, math.exp(-0.4)), ("mis", -1.2, 0.0), ("sequence_mask", 0.3, 1.0)],
)  # fmt: skip
def test_the_gradient_is_the_on_policy_one_times_the_weight(
    tmp_path: Path, kind: str, shift: float, weight: float
) -> None:
    exact = first_step(tmp_path / "exact", 0.0, None)
    found = first_step(tmp_path / "found", shift, RolloutCorrection(kind))
    assert exact["logprob_mismatch"] < 1e-5 and exact["grad_norm"] > 0.01
    assert found["logprob_mismatch"] == pytest.approx(abs(shift), abs=1e-4)
    assert found["importance_weight"] == pytest.approx(weight, abs=1e-4)
    assert found["grad_norm"] == pytest.approx(exact["grad_norm"] * weight, rel=1e-3, abs=1e-6)
    balance = Ledger(tmp_path / "found" / FILE, writes=False).balance()
    assert balance.dropped == ({} if weight else {"off-policy": 4})
    assert balance.drawn == balance.used + sum(balance.dropped.values()) == 4


def test_a_batch_of_which_nothing_can_be_judged_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = first_step(tmp_path / "none", 0.0, None, rewards=[None] * 4)
    assert found["unscored_fraction"] == 1 and "reward" not in found and "grad_norm" not in found
    assert "step 1: none of the rollouts could be judged: no answer" in capsys.readouterr().out
    balance = Ledger(tmp_path / "none" / FILE, writes=False).balance()
    assert balance.dropped == {"unjudged: no answer": 4} and not balance.used
    found = first_step(tmp_path / "half", 0.0, None, rewards=[None, 0.0, None, 1.0])
    assert (found["unscored_fraction"], found["reward"], found["kept_fraction"]) == (0.5, 0.5, 0.5)


def test_a_masked_sequence_is_dropped_for_its_bad_completions_only(tmp_path: Path) -> None:
    found = first_step(tmp_path / "far", 0.6, RolloutCorrection("sequence_mask"))
    assert 0 < found["importance_weight"] < 1
    balance = Ledger(tmp_path / "far" / FILE, writes=False).balance()
    assert (balance.used, balance.dropped) == (2, {"off-policy": 2})


@pytest.mark.parametrize("correction", [None, RolloutCorrection("tis")])
def test_log_probabilities_are_compared_at_the_sampling_temperature(
    tmp_path: Path, correction: RolloutCorrection | None
) -> None:
    assert first_step(tmp_path / "warm", 0.0, correction, 0.6)["logprob_mismatch"] < 1e-5
