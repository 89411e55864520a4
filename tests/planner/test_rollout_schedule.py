"""The simulation of servers beside a trainer, where the answer is known by hand."""

import random
from itertools import pairwise
from typing import Any

import pytest

from q3mega.errors import UserError
from q3mega.planner.plan import table_of_schedules
from q3mega.planner.rollout_schedule import Rates, finish_times, pace


def rates(**given: Any) -> Rates:
    """A second a decoding step, however many sequences."""
    usual: dict[str, Any] = {
        "decode": lambda n: 1.0, "servers": 1, "slots": 8, "train": 5.0, "sync": 1.0,
    }  # fmt: skip
    return Rates(**usual | given)


def test_the_synchronous_schedule_is_a_sum() -> None:
    lengths = [[3, 10], [7, 7], [1, 20]]
    # the longest answer, the updates, the weights, in turn
    assert finish_times(rates(), lengths, 0) == pytest.approx([16, 29, 55])


def test_one_batch_ahead_is_sampled_during_the_updates() -> None:
    lengths = [[10]] * 4
    # the second begins with the first; the third when the first is learnt from, at 16
    assert finish_times(rates(), lengths, 1) == pytest.approx([16, 22, 33, 39])


def test_a_server_takes_no_more_than_its_slots_and_two_share() -> None:
    assert finish_times(rates(slots=2), [[4, 6, 3]], 0) == pytest.approx([7 + 6])
    assert finish_times(rates(slots=2, servers=2), [[4, 6, 3]], 0) == pytest.approx([6 + 6])


def test_more_sequences_at_once_make_a_step_longer() -> None:
    # two of four tokens together at 2 s a token, then the longer one's last two at 1 s
    found = finish_times(rates(decode=lambda n: float(n), train=0.0, sync=0.0), [[4, 6]], 0)
    assert found == pytest.approx([4 * 2 + 2])


def test_the_weights_stop_the_servers() -> None:
    # at 5 the servers stop for a second, with 15 of 20 tokens to go, then 4 s of updates go on
    found = finish_times(rates(train=5.0), [[0], [20]], 1)
    assert found == pytest.approx([6, 6 + 15 + 5 + 1])


@pytest.mark.parametrize("seed", range(20))
def test_staleness_never_costs_and_never_beats_the_busier_side(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [[rng.randint(1, 40) for _ in range(12)] for _ in range(16)]
    given = rates(train=rng.uniform(1, 60), sync=0.0, slots=rng.choice([2, 4, 12]))
    paces = [finish_times(given, lengths, n)[-1] for n in (0, 1, 3, 8)]
    assert all(b <= a + 1e-6 for a, b in pairwise(paces))
    decoded = sum(map(sum, lengths)) / given.slots
    assert paces[-1] >= max(given.train * len(lengths), decoded) - 1e-6
    assert finish_times(given, lengths, 0) == sorted(finish_times(given, lengths, 0))


def test_the_pace_leaves_out_start_and_end() -> None:
    assert pace([100, 110, 120, 130, 140, 150, 160, 161]) == pytest.approx(10)


def test_a_plan_of_reinforcement_gains_from_servers_beside() -> None:
    table, fits = table_of_schedules("qwen3-0.6b", 4, "h100", 2048, 64, 2)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert fits and [r[:2] for r in rows] == [["all", "all"], ["3", "1"], ["2", "2"], ["1", "3"]]
    for row in rows[1:]:
        paces = [float(c) for c in row[4:8]]
        assert paces == sorted(paces, reverse=True) and paces[-1] >= float(row[3])


def test_what_no_gpus_can_do_is_said() -> None:
    table, fits = table_of_schedules("qwen3-235b-a22b", 8, "h100", 2048, 64, 2)
    assert not fits and "take more GPUs" in table


def test_updates_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="--rl 0 must be 1 or more"):
        table_of_schedules("qwen3-0.6b", 4, "h100", 2048, 64, 0)
