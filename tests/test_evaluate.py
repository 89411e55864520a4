"""Intervals and pass@k against their definitions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.evaluate import held_out, pass_at_k, proportion


def test_wilson_interval_of_a_known_case():
    found = proportion([1.0] * 8 + [0.0] * 2)  # 8 of 10: Wilson gives 0.490 .. 0.943
    assert (found["low"], found["high"]) == pytest.approx((0.490, 0.943), abs=5e-4)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=50))
def test_an_interval_holds_its_value(outcomes):
    found = proportion(outcomes)
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


@given(st.lists(st.booleans(), min_size=3, max_size=7), st.integers(1, 3))
def test_pass_at_k_counts_subsets(tries, k):
    subsets = list(itertools.combinations(tries, k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    assert pass_at_k([tries], k)["value"] == pytest.approx(expected)


def test_held_out_problems_are_held_out():
    problems = held_out(40)
    assert all(p.heldout for p in problems)
    assert len({p.id for p in problems}) == 40
    assert len({p.family for p in problems}) == 4
