"""Intervals and pass@k against their definitions."""

import itertools
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES

from q3mega.corpus import documents
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.engine import Engine
from q3mega.evaluation.intervals import averages, pass_at_k, proportion
from q3mega.evaluation.language_model import expert_load
from q3mega.problems.pool import Pool


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


@given(st.lists(st.lists(st.none() | st.floats(-3, 3), min_size=1, max_size=4), min_size=1))
def test_averages_leave_out_what_could_not_be_judged(scores):
    judged = [[s for s in tries if s is not None] for tries in scores]
    found, means = averages(scores), [statistics.fmean(tries) for tries in judged if tries]
    assert found["n"] == len(means)
    assert found["value"] == pytest.approx(statistics.fmean(means) if means else 0.0, abs=1e-12)
    assert found["low"] <= found["value"] <= found["high"]
    share = 1 - sum(map(len, judged)) / sum(map(len, scores))
    assert found.get("unscored_fraction", 0.0) == pytest.approx(share)


def test_the_interval_of_scores_below_0_is_the_normal_one():
    found = proportion([-1.0, 1.0] * 50)
    assert found["high"] == -found["low"] == pytest.approx(1.959964 / 99**0.5)


def test_pass_at_k_needs_k_judged_tries():
    tries = [[True, None, False], [None, None, True], [None] * 3]
    assert pass_at_k(tries, 2) == proportion([1.0])


def test_held_out_problems_are_held_out():
    problems = Pool().held_out(42)
    assert all(p.heldout for p in problems)
    assert len({p.id for p in problems}) == 42
    assert len({p.family for p in problems}) == 3


def test_expert_load_is_the_busiest_over_the_mean(tmp_path):
    texts = list(itertools.islice(documents.documents("worked", 0), 200))
    train_tokenizer(texts, 280, tmp_path)
    shape = replace(SHAPES["moe"], vocab=280)
    engine = Engine(shape, LAYOUT(), seed=1)
    found = expert_load(engine, Tokenizer(tmp_path), ["worked"], seed=0)
    worst, best = (found[f"expert_load_{end}_layer"] for end in ("worst", "best"))
    assert worst["n"] == shape.layers
    assert 1 <= best["value"] <= worst["value"] <= shape.experts / shape.topk
    router = engine.chunks[0].decoder.layers[0].mlp.router
    router.weight.data.zero_()  # all experts alike: ties go to the same two, the worst load
    found = expert_load(engine, Tokenizer(tmp_path), ["worked"], seed=0)
    assert found["expert_load_worst_layer"]["value"] == pytest.approx(shape.experts / shape.topk)
