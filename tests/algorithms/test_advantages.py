"""Advantages, entropy control, weights: against the formulas written out."""

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.algorithms.advantages import group_advantages
from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.losses import normalise
from q3mega.data.batch import Sample
from q3mega.rewards.overlong import overlong_penalty

rewards = st.lists(st.floats(0, 1), min_size=2, max_size=16)


@given(rewards)
def test_advantages_are_standard_scores(r):
    advantages = group_advantages(r)
    if max(r) - min(r) < 1e-9:
        assert advantages is None
        return
    assert statistics.fmean(advantages) == pytest.approx(0, abs=1e-6)
    assert statistics.pstdev(advantages) == pytest.approx(1, abs=1e-6)
    assert [a > b for a, b in itertools.pairwise(advantages)] == [
        a > b for a, b in itertools.pairwise(r)
    ] or min(abs(a - b) for a in r for b in r if a != b) < 1e-12


def test_dr_grpo_keeps_the_scale():
    assert group_advantages([1.0, 0.0, 0.0, 0.0], scale_by_std=False) == [0.75, -0.25, -0.25, -0.25]


def test_overlong_penalty_is_linear_in_the_buffer():
    assert [overlong_penalty(n, limit=20, buffer=4) for n in (10, 16, 18, 20, 30)] == [
        0,
        0,
        -0.5,
        -1,
        -1,
    ]


def test_the_controller_raises_the_bonus_only_while_entropy_is_low():
    controller = EntropyController(hold=0.5, step=0.1, limit=0.25)
    assert controller.update(1.0) == 0  # the target is now 0.5
    assert [controller.update(h) for h in (0.4, 0.3, 0.2)] == pytest.approx([0.1, 0.2, 0.25])
    assert controller.update(0.9) == pytest.approx(0.15)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_weights_sum_to_the_wanted_means(lengths):
    samples = [Sample([0] * n, [1.0] * n) for n in lengths]
    by_token = [sum(s.weights) for s in normalise(samples, "token")]
    assert by_token == pytest.approx([n / sum(lengths) for n in lengths])
    by_sequence = [sum(s.weights) for s in normalise(samples, "sequence")]
    assert by_sequence == pytest.approx([1 / len(lengths)] * len(lengths))
    constant = [sum(s.weights) for s in normalise(samples, "constant", 10)]
    assert constant == pytest.approx([n / (10 * len(lengths)) for n in lengths])
    assert math.isclose(sum(by_token), 1)
