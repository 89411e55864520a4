"""The C++ packing and blending against slow readings of their definitions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega._data import best_fit_pack, blend_index

CAPACITY = 64
lengths_lists = st.lists(st.integers(1, CAPACITY), max_size=60)


def pack(lengths: list[int]) -> list[list[int]]:
    return [b.tolist() for b in best_fit_pack(np.array(lengths, dtype=np.int64), CAPACITY)]


def slow_best_fit(lengths: list[int]) -> list[list[int]]:
    """Longest first, into the bin with the least room that suffices, the oldest of equals."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b, free in enumerate(room) if free >= lengths[i]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
        else:
            best = len(bins)
            bins.append([])
            room.append(CAPACITY)
        bins[best].append(i)
        room[best] -= lengths[i]
    return bins


def next_fit(lengths: list[int]) -> int:
    """Bins that packing in the given order needs, looking at the last bin only."""
    bins, free = 0, 0
    for length in lengths:
        if length > free:
            bins, free = bins + 1, CAPACITY
        free -= length
    return bins


@given(lengths_lists)
def test_packing_is_best_fit_decreasing(lengths):
    assert pack(lengths) == slow_best_fit(lengths)


@given(lengths_lists)
def test_packing_keeps_every_sequence_once_within_capacity(lengths):
    bins = pack(lengths)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= CAPACITY for b in bins)


@given(st.lists(st.integers(1, CAPACITY - 1), max_size=30))
def test_packing_wastes_little_of_bins_that_can_be_full(pieces):
    # Cut full bins in two: the best packing wastes nothing, and best-fit decreasing needs at most
    # 11/9 of its bins plus 6/9 (Dosa 2007).
    lengths = [part for piece in pieces for part in (piece, CAPACITY - piece)]
    assert len(pack(lengths)) <= Fraction(11 * len(pieces) + 6, 9)


def test_packing_wastes_less_than_order_of_arrival():
    lengths = np.random.default_rng(0).lognormal(2.5, 0.8, 5000).clip(1, CAPACITY).astype(int)
    bins = len(pack(lengths.tolist()))
    least = -(-lengths.sum() // CAPACITY)
    assert bins <= 1.01 * least
    assert next_fit(lengths.tolist()) >= 1.1 * bins


def test_packing_nothing_gives_no_bins():
    assert pack([]) == []


@pytest.mark.parametrize("length", [0, -1, CAPACITY + 1])
def test_packing_refuses_a_length_outside_the_capacity(length):
    with pytest.raises(ValueError, match=rf"lengths\[1\]={length} must lie in 1..capacity=64"):
        pack([5, length])


def test_packing_refuses_fractions():
    with pytest.raises(TypeError):
        best_fit_pack(np.array([1.5]), CAPACITY)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any), st.integers(0, 80))
def test_blending_takes_the_dataset_that_lags_most(weights, n):
    # Powers of two sum to a power of two, so that the shares are exact and ties are ties.
    weights = [2**w if w else 0 for w in weights]
    weights.append(2 ** sum(weights).bit_length() - sum(weights))
    dataset, sample = blend_index(np.array(weights, dtype=float), n)
    counts = [0] * len(weights)
    for i, (which, place) in enumerate(zip(dataset.tolist(), sample.tolist(), strict=True)):
        lags = [
            Fraction(w * (i + 1), sum(weights)) - c for w, c in zip(weights, counts, strict=True)
        ]
        assert which == max((d for d, w in enumerate(weights) if w), key=lambda d: lags[d])
        assert place == counts[which]
        counts[which] += 1


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=6).filter(any), st.integers(1, 500))
def test_blending_follows_the_weights_at_every_prefix(weights, n):
    dataset, _ = blend_index(np.array(weights), n)
    shares = np.array(weights) / sum(weights)
    taken = (dataset[:, None] == np.arange(len(weights))).cumsum(0)
    due = np.arange(1, n + 1)[:, None] * shares
    assert (taken - due).max() <= 1 + 1e-9  # never a whole sample ahead
    assert (due - taken).max() <= len(weights) - 1 + 1e-9


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -0.5], [float("nan")], [float("inf"), 1.0]])
def test_blending_refuses_weights_without_a_meaning(weights):
    with pytest.raises(ValueError, match="weights"):
        blend_index(np.array(weights), 4)


def test_blending_refuses_a_negative_number_of_samples():
    with pytest.raises(ValueError, match="n=-1"):
        blend_index(np.array([1.0]), -1)
