"""The teacher's top-k on disk: what is read is what was written, and half a store is none."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from q3mega import device  # noqa: F401

# isort: split
import torch

from q3mega import ops
from q3mega.distillation.topk import TeacherTopK, TopKWriter
from q3mega.errors import UserError

VOCABULARY, K = 151_936, 8


def document(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logprobs = (3 * torch.randn(tokens, 50, generator=g)).log_softmax(-1)
    best = logprobs.topk(K)
    names = torch.randperm(VOCABULARY, generator=g)[:50]
    names[0] = VOCABULARY - 1
    return names[best.indices], best.values


def write(folder, documents):
    with TopKWriter(folder, k=K, vocab_size=VOCABULARY) as store:
        for ids, logprobs in documents:
            store.add(ids, logprobs)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=6))
def test_round_trip(tmp_path_factory, lengths):
    folder = tmp_path_factory.mktemp("store")
    documents = [document(n, seed) for seed, n in enumerate(lengths)]
    write(folder, documents)
    store = TeacherTopK(folder)
    assert len(store) == len(documents) and store.k == K and store.vocab_size == VOCABULARY
    for i, (ids, logprobs) in enumerate(documents):
        found, values = store[i]
        assert torch.equal(found, ids)
        torch.testing.assert_close(values, logprobs.clamp(min=-32), atol=1 / 1024 + 1e-6, rtol=0)
    assert (folder / "topk.bin").stat().st_size == 4 * K * sum(lengths)


def test_the_loss_from_the_store_is_the_loss(tmp_path):
    torch.manual_seed(0)
    hidden, weight, teacher = torch.randn(12, 6), torch.randn(64, 6), 3 * torch.randn(12, 64)
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    with TopKWriter(tmp_path, k=K, vocab_size=64) as store:
        store.add(ids, logprobs)
    stored = TeacherTopK(tmp_path)[0]
    exact, found = (
        ops.distill_loss(hidden, weight, teacher_topk=top, divergence="forward_kl", tail=False).loss
        for top in ((ids, logprobs), stored)
    )
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=0)


def test_an_unfinished_store_is_none(tmp_path):
    write(tmp_path, [document(3)])
    with pytest.raises(ZeroDivisionError), TopKWriter(tmp_path, k=K, vocab_size=VOCABULARY) as s:
        s.add(*document(3))
        raise ZeroDivisionError
    with pytest.raises(UserError, match="no finished top-k store"):
        TeacherTopK(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "ends", "json", "field", "documents"])
def test_files_that_do_not_fit_together(tmp_path, damage):
    write(tmp_path, [document(3), document(4, 1)])
    if damage == "cut":
        (tmp_path / "topk.bin").write_bytes((tmp_path / "topk.bin").read_bytes()[:-4])
    elif damage == "ends":
        (tmp_path / "topk.ends").write_bytes((tmp_path / "topk.ends").read_bytes()[:-8])
    elif damage == "json":
        (tmp_path / "topk.json").write_text("[1")
    elif damage == "field":
        (tmp_path / "topk.json").write_text(json.dumps({"k": K, "vocab_size": VOCABULARY}))
    else:
        about = json.loads((tmp_path / "topk.json").read_text())
        (tmp_path / "topk.json").write_text(json.dumps(about | {"documents": 3}))
    with pytest.raises(UserError, match="write it again"):
        TeacherTopK(tmp_path)


def test_what_cannot_be_stored_is_refused(tmp_path):
    ids, logprobs = document(2)
    with TopKWriter(tmp_path, k=K, vocab_size=VOCABULARY) as store:
        for bad, word in (
            ((ids, logprobs[:1]), "must both be"),
            ((ids[:, :2], logprobs[:, :2]), "must both be"),
            ((ids + VOCABULARY, logprobs), "the vocabulary has"),
            ((ids, logprobs + 20), "at most 0"),
            ((ids, logprobs * float("nan")), "at most 0"),
        ):
            with pytest.raises(UserError, match=word):
                store.add(*bad)
    for k, vocabulary in ((0, 10), (11, 10), (4, 300_000)):
        with pytest.raises(UserError, match="18 bits"):
            TopKWriter(tmp_path, k=k, vocab_size=vocabulary)
