"""Corrections for the sampler: against the formulas written out, in float64."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.errors import UserError

logprob = st.floats(-30, 0)
pairs = st.lists(st.tuples(logprob, logprob), min_size=1, max_size=12)


def weights(kind, found, advantage=1.0, **caps):
    trainer, sampler = (np.array(column) for column in zip(*found, strict=True))
    return RolloutCorrection(kind, **caps).importance_weights(trainer, sampler, advantage).tolist()


@given(pairs, st.floats(1.0, 8.0))
def test_truncated_weights_are_the_ratio_up_to_the_cap(found, cap):
    expected = [min(math.exp(a - b), cap) for a, b in found]
    assert weights("tis", found, cap=cap) == pytest.approx(expected, rel=1e-12)


@given(pairs, st.floats(0.1, 0.9), st.floats(1.1, 8.0))
def test_masked_weights_are_the_ratio_within_the_band(found, low, high):
    for weight, (a, b) in zip(weights("mis", found, band=(low, high)), found, strict=True):
        ratio = math.exp(a - b)
        if min(abs(ratio / low - 1), abs(ratio / high - 1)) > 1e-9:  # off the edges
            assert weight == (pytest.approx(ratio, rel=1e-12) if low < ratio < high else 0.0)


@given(pairs, st.floats(-2, 2), st.floats(0.1, 2))
def test_a_bad_completion_that_the_trainer_would_not_write_is_masked(found, advantage, delta):
    divergence = statistics.fmean(b - a for a, b in found)
    if abs(divergence - delta) < 1e-9:
        return
    expected = 0.0 if advantage < 0 and divergence > delta else 1.0
    assert weights("sequence_mask", found, advantage, delta=delta) == [expected] * len(found)


@given(st.lists(logprob, min_size=1), st.sampled_from(["tis", "mis", "sequence_mask"]))
def test_where_sampler_and_trainer_agree_nothing_is_corrected(found, kind):
    assert weights(kind, [(x, x) for x in found], -1.0) == [1.0] * len(found)


def test_the_published_constants():
    far = [(0.0, -1.0), (-1.0, 0.0), (0.0, -0.6), (0.0, -0.8)]
    e = math.exp
    assert weights("tis", far) == pytest.approx([2.0, e(-1), e(0.6), 2.0])
    assert weights("mis", far) == pytest.approx([0.0, 0.0, e(0.6), 0.0])
    assert weights("sequence_mask", [(-0.6, 0.0)], -1.0) == [0.0]
    assert weights("sequence_mask", [(-0.4, 0.0)], -1.0) == [1.0]


@given(pairs, st.integers(0, 11), st.sampled_from([math.nan, -math.inf]))
def test_a_log_probability_that_is_none_is_refused(found, place, broken):
    place %= len(found)
    found = [*found[:place], (found[place][0], broken), *found[place + 1 :]]
    for kind in ("tis", "mis", "sequence_mask"):
        with pytest.raises(UserError, match=f"rollout_correction={kind}: .*not finite"):
            weights(kind, found)
