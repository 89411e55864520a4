"""Packing: what a loss sees is what the samples said."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.batch import Sample, collate, pack

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def samples_of(lengths):
    start = 0
    out = []
    for n in lengths:
        tokens = list(range(start, start + n))
        weights = [float(t % 3) for t in tokens]
        out.append(Sample(tokens, weights, {"old": [t / 10 for t in tokens]}))
        start += n
    return out


@given(lengths)
def test_targets_and_columns_line_up_within_documents(lengths):
    batch = collate(samples_of(lengths))
    assert batch.cu_seqlens.diff().tolist() == lengths
    last = batch.cu_seqlens[1:].long() - 1
    inner = torch.ones(len(batch), dtype=torch.bool)
    inner[last] = False
    assert torch.equal(batch.targets[inner], batch.tokens[inner] + 1)
    assert torch.equal(batch.loss_weights[inner], (batch.targets[inner] % 3).float())
    assert torch.allclose(batch.columns["old"][inner], batch.targets[inner] / 10)
    assert batch.loss_weights[last].eq(0).all()
    assert batch.seq_ids.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]


@given(lengths, st.integers(1, 90))
def test_packing_loses_nothing_and_respects_the_capacity(lengths, capacity):
    batches = pack(samples_of(lengths), capacity)
    assert all(len(b) <= max(capacity, *lengths) for b in batches)
    tokens = sorted(t for b in batches for t in b.tokens.tolist())
    assert tokens == list(range(sum(lengths)))
