"""A teacher behind a server gives the best tokens that its engine has."""

import random
from types import SimpleNamespace

import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch
from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from helpers.token_server import token_server

from q3mega.algorithms.losses import distillation_topk
from q3mega.data.batch import Sample, collate
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.distillation.served_teacher import ServedTeacher
from q3mega.distillation.teaching import taught_by
from q3mega.distillation.topk import TeacherTopK
from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.rollout import SamplingParams
from q3mega.rollout.logprobs import top_logprobs
from q3mega.rollout.servers import sampler
from q3mega.stages.common.teachers import keep_topk

SHAPE = SHAPES["dense"]
K = 5


@pytest.fixture(scope="module")
def engine():
    engine = Engine(SHAPE, LAYOUT(), seed=6)
    for parameter in engine.chunks[0].parameters():  # away from uniform
        parameter.data *= 2 if parameter.dim() > 1 else 1
    return engine


@pytest.fixture
def batches():
    rng = random.Random(0)
    lengths = [[7, 1, 12], [20]]
    return [
        collate([Sample([rng.randrange(64) for _ in range(n)], [0.1] * n) for n in row])
        for row in lengths
    ]


def test_best_tokens_are_those_of_the_engine(engine, batches):
    with token_server(engine) as server:
        found = ServedTeacher(server.url, TOKENIZER, SHAPE).top_logprobs(batches, K)
    assert len(server.asked) == 4  # a request a document
    for batch, (ids, logprobs), (right, values) in zip(
        batches, found, top_logprobs(engine, batches, K), strict=True
    ):
        assert ids.shape == logprobs.shape == (len(batch), K)
        counts = batch.loss_weights > 0  # not after a document's last token
        assert counts.sum() == len(batch) - len(batch.cu_seqlens) + 1
        assert torch.equal(ids[counts], right[counts])
        torch.testing.assert_close(logprobs[counts], values[counts], rtol=1e-5, atol=1e-5)


def test_padding_rows_of_the_server_are_no_tokens(engine, batches):
    fewer = SimpleNamespace(**vars(TOKENIZER) | {"vocab_size": 50})
    with token_server(engine) as server:
        known, every = (
            ServedTeacher(server.url, tokenizer, SHAPE).top_logprobs(batches, 40)
            for tokenizer in (fewer, TOKENIZER)
        )
    for (ids, logprobs), (all_ids, all_logprobs) in zip(known, every, strict=True):
        assert int(ids.max()) < 50 <= int(all_ids.max())
        assert all(len(set(row)) == 40 for row in ids.tolist())
        assert bool((logprobs.exp().sum(1) <= all_logprobs.exp().sum(1) + 1e-6).all())
        same = all_ids < 50  # in the same order, before those in the padding's place
        for row, values, keep, whole, theirs in zip(
            ids, logprobs, same, all_ids, all_logprobs, strict=True
        ):
            n = int(keep.sum())
            assert torch.equal(row[:n], whole[keep]) and torch.equal(values[:n], theirs[keep])
            assert bool((values[n:] == theirs.min()).all())


def test_its_loss_is_that_of_a_teacher_in_process(engine, batches):
    student = Engine(SHAPES["tied"], LAYOUT(), seed=1)
    config = SimpleNamespace(divergence="forward_kl", temperature=1.0, teacher_topk=K)

    def value(teacher):
        loss, prepare = taught_by(teacher, config)
        prepare(batches)
        return sum(student.evaluate(batches, lambda head, b: float(loss(head, b)[0])))

    with token_server(engine) as server:
        found = value(ServedTeacher(server.url, TOKENIZER, SHAPE))
    expected = value(engine)
    assert expected > 1e-2 and found == pytest.approx(expected, rel=1e-5)
    for batch in batches:  # the columns are what the loss reads
        batch.columns["teacher_ids"] = batch.columns["teacher_ids"].roll(1, 0)
    moved = student.evaluate(
        batches, lambda head, b: float(distillation_topk("forward_kl")(head, b)[0])
    )
    assert abs(sum(moved) - expected) > 1e-3 * expected


def test_a_failure_is_asked_again_and_a_refusal_is_told(engine, batches, monkeypatch):
    monkeypatch.setattr(sampler, "FIRST_BACK_OFF_S", 0.01)
    with token_server(engine, lambda path, body, n: "500" if n == 2 else None) as server:
        found = ServedTeacher(server.url, TOKENIZER, SHAPE).top_logprobs(batches, K)
    with token_server(engine) as calm:
        calmly = ServedTeacher(calm.url, TOKENIZER, SHAPE).top_logprobs(batches, K)
    for (ids, logprobs), (same, equal) in zip(found, calmly, strict=True):
        assert torch.equal(ids, same) and torch.equal(logprobs, equal)
    with token_server(engine, lambda path, body, n: "400" if n > 1 else None) as server:
        teacher = ServedTeacher(server.url, TOKENIZER, SHAPE)
        with pytest.raises(UserError, match=r"teacher_topk=5: .*answered 400.*--max-logprobs"):
            teacher.top_logprobs(batches, K)


def test_a_server_of_fewer_log_probabilities_is_refused(engine, batches, monkeypatch):
    with token_server(engine) as server:
        teacher = ServedTeacher(server.url, TOKENIZER, SHAPE)
        monkeypatch.setattr("helpers.token_server.Vllm.best_of", lambda *_: None)
        with pytest.raises(UserError, match=r"gave no 5 log-probabilities of each of 7 tokens"):
            teacher.top_logprobs(batches, K)


def test_another_tokenizer_is_refused(engine, tmp_path):
    for name, text in (("ours", "aaaa"), ("theirs", "12+345 12+345 useruser")):
        train_tokenizer([text], 268 if name == "theirs" else 265, tmp_path / name)
    ours, theirs = Tokenizer(tmp_path / "ours"), Tokenizer(tmp_path / "theirs")
    with token_server(engine) as server:
        server.tokenizer = ours
        ServedTeacher(server.url, ours, SHAPE)
        server.tokenizer = theirs
        with pytest.raises(UserError, match="its tokenizer gives other ids"):
            ServedTeacher(server.url, ours, SHAPE)
    assert ours.digest() != theirs.digest()


def test_it_writes_text(engine):
    with token_server(engine) as server:
        teacher = ServedTeacher(server.url, TOKENIZER, SHAPE)
        [[found]] = teacher.generate([[1, 2, 3]], SamplingParams(4, seed=0))
    assert 1 <= len(found.tokens) <= 4


def test_it_fills_the_store_of_off_policy_distillation(engine, batches, tmp_path):
    samples = [Sample(b.tokens[:7].tolist(), [0.1] * 7) for b in batches]

    def stored(name, **teacher):
        settings = {"teacher_topk": K, "teacher_timeout_s": 30.0, "teacher_key_env": None}
        stage = SimpleNamespace(
            data=tmp_path / name, leads=True, prepared=lambda _: False, barrier=lambda: None,
            tokenizer=TOKENIZER, config=SimpleNamespace(**settings, **teacher),
            recipe=SimpleNamespace(model=None), shape=lambda _: SHAPE,
        )  # fmt: skip
        keep_topk(stage, samples)
        return TeacherTopK(stage.data / "topk")

    with token_server(engine) as server:
        served_store = stored("served", teacher_url=server.url, teacher_serves=True)
    for i, (ids, logprobs) in enumerate(top_logprobs(engine, [collate([s]) for s in samples], K)):
        kept, values = served_store[i]
        assert torch.equal(kept[:-1], ids[:-1])  # nothing is learnt after the last token
        torch.testing.assert_close(values[:-1], logprobs[:-1], rtol=0, atol=1.1e-3)
    assert len(served_store) == len(samples)
