"""Cutting a global batch over data-parallel ranks."""

import pytest

from q3mega.data.batch import Sample
from q3mega.engine import parallel


@pytest.mark.parametrize("samples", [1, 2, 3, 8])
def test_every_rank_gets_work_and_every_sample_counts_once(monkeypatch, samples) -> None:
    batch = [Sample([1] * (2 + i), [0.0] + [1.0] * (1 + i)) for i in range(samples)]
    monkeypatch.setattr(parallel, "data_size", lambda: 3)
    weight = 0.0
    for rank in range(3):
        monkeypatch.setattr(parallel, "data_rank", lambda rank=rank: rank)
        micro_batches = parallel.shard_by_length(batch, 16)
        assert micro_batches  # a rank with nothing to do would leave the others waiting
        weight += sum(float(b.loss_weights.sum()) for b in micro_batches)
    assert weight == sum(sum(s.weights) for s in batch)
