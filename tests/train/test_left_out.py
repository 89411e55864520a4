"""RL on numbers that are none: they cost the completion or the update, never the run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES

from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.engine import Engine, OptimizerSpec
from q3mega.evaluation.evaluate import entropy_ratio
from q3mega.io import whole_records
from q3mega.rollout import Completion
from q3mega.train.ledger import FILE, Balance, Ledger
from q3mega.train.log import Log
from q3mega.train.rl import train
from q3mega.train.rollouts import Rollout
from q3mega.train.samples import PolicySettings
from q3mega.train.schedule import SynchronousSchedule


def learn(
    folder: Path, spoil: Callable[[list[Rollout]], object], *, steps: int = 1, **settings: Any
) -> tuple[list[dict[str, Any]], Balance]:
    """The record and the ledger of steps with one update each; `spoil` changes the first batch."""
    spec = OptimizerSpec(lr=1e-3, steps=4)
    engine = Engine(SHAPES["tied"], LAYOUT(), seed=3, optimizer=spec)
    reference = Engine(SHAPES["tied"], LAYOUT(), seed=4)

    def roll_out(step: int) -> list[Rollout]:
        texts = [[7 + i, 8, 9 + step, 10, 63] for i in range(4)]
        found = [Completion(t, [-4.0] * 5, [1] * 5, "stop") for t in texts]
        rollouts = [Rollout([1, 2, 3], c, 0, float(i % 2)) for i, c in enumerate(found)]
        if step == 1:
            spoil(rollouts)
        return rollouts

    train(
        engine, SynchronousSchedule(roll_out), PolicySettings(1, 256, 8, **settings),
        EntropyController(0.5, 0.01, 0.1), prompts=lambda step: [], steps=steps, save_every=9,
        folder=folder / "checkpoints", log=Log(folder, steps), reference=reference,
    )  # fmt: skip
    return whole_records(folder / "metrics.jsonl"), Ledger(folder / FILE, writes=False).balance()


@pytest.mark.parametrize("correction", [None, RolloutCorrection("tis")])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_unknown_log_probability_costs_its_completion(
    tmp_path: Path, correction: RolloutCorrection | None, value: float
) -> None:
    def spoil(rollouts: list[Rollout]) -> None:
        rollouts[1].completion.logprobs[2] = value

    (found,), balance = learn(tmp_path, spoil, correction=correction)
    assert math.isfinite(found["loss"]) and found["grad_norm"] > 0.01 and "skipped" not in found
    assert (balance.used, balance.dropped) == (3, {"old_logprobs not finite": 1})


def test_what_the_model_did_not_choose_needs_no_log_probability(tmp_path: Path) -> None:
    def spoil(rollouts: list[Rollout]) -> None:
        completion = rollouts[1].completion
        completion.logprobs[2], completion.mask[2] = math.nan, 0

    (found,), balance = learn(tmp_path, spoil)
    assert (
        math.isfinite(found["logprob_mismatch"]) and found["grad_norm"] > 0.01 and balance.used == 4
    )


def test_a_skipped_update_has_learnt_from_nothing(tmp_path: Path) -> None:
    def spoil(rollouts: list[Rollout]) -> None:
        rollouts[0].reward = 1e300  # more than fp32 holds

    (first, second), balance = learn(tmp_path, spoil, steps=2, scale_by_std=False)
    assert first["skipped"] == 1 and not {"loss", "entropy"} & first.keys()
    assert math.isfinite(second["loss"]) and second["entropy"] > 0 and "skipped" not in second
    assert (balance.used, balance.dropped) == (4, {"skipped update": 4})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_entropy_that_is_none_leaves_its_controller_as_it_was(value: float) -> None:
    controller = EntropyController(0.5, 0.1, 1.0)
    assert controller.update(value) == 0 and controller.target is None
    controller.update(2.0)
    controller.update(0.5)
    assert controller.update(value) == pytest.approx(0.1) and controller.target == 1.0


def test_an_entropy_that_was_none_is_no_part_of_the_ratio(tmp_path: Path) -> None:
    rows = ["2.0", "null", "1.0"] * 10
    lines = (f'{{"step": {i}, "entropy": {x}}}\n' for i, x in enumerate(rows))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    found = entropy_ratio(tmp_path / "metrics.jsonl")["entropy_ratio"]
    assert found == {"value": 1.0, "n": 20}
