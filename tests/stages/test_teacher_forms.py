"""A teacher's distribution by hidden states, as its best tokens, and those from disk: one loss."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch
from helpers.tiny_models import LAYOUT, SHAPES

from q3mega.algorithms.losses import distillation_topk
from q3mega.data.batch import Sample, collate
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.distillation.teaching import hidden_of_teacher, topk_of_teacher
from q3mega.distillation.topk import TeacherTopK, TopKWriter, WithTeacher
from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.rollout.logprobs import top_logprobs
from q3mega.stages.common.teachers import teacher_folder

VOCABULARY = SHAPES["tied"].vocab


def samples(n=3):
    rng = random.Random(0)
    lengths = [rng.randint(5, 20) for _ in range(n)]
    return [
        Sample([rng.randrange(VOCABULARY) for _ in range(m)], [0.0] * 2 + [0.1] * (m - 2))
        for m in lengths
    ]


@pytest.fixture(scope="module")
def engines():
    student = Engine(SHAPES["tied"], LAYOUT(), seed=1)
    return student, Engine(replace(SHAPES["tied"], tied=False, layers=3), LAYOUT(), seed=2)


def loss_of(student, batch, loss_fn):
    [value] = student.evaluate([batch], lambda head, b: float(loss_fn(head, b)[0]))
    return value


def taught(engines, teach, divergence="forward_kl", k=0, temperature=1.0):
    student, teacher = engines
    config = SimpleNamespace(divergence=divergence, temperature=temperature, teacher_topk=k)
    loss, prepare = teach(teacher, config)
    batch = collate(samples())
    prepare([batch])
    return loss_of(student, batch, loss)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_but_one_are_the_whole_distribution(engines, divergence, temperature):
    """With K = V - 1 the bucket of the others holds one token: nothing is lost."""
    whole = taught(engines, hidden_of_teacher, divergence, temperature=temperature)
    best = taught(engines, topk_of_teacher, divergence, VOCABULARY - 1, temperature)
    assert whole > 1e-3 and best == pytest.approx(whole, rel=1e-4)


def test_fewer_tokens_are_a_lower_bound(engines):
    """Joining tokens to one bucket can only lower a divergence (data processing)."""
    whole = taught(engines, hidden_of_teacher)
    found = [taught(engines, topk_of_teacher, k=k) for k in (2, 8, 32)]
    assert 0 < found[0] < found[1] < found[2] < whole


def test_the_store_gives_the_loss_of_the_teacher_that_filled_it(engines, tmp_path):
    student, teacher = engines
    rows = samples()
    with TopKWriter(tmp_path, k=16, vocab_size=VOCABULARY) as store:
        for ids, logprobs in top_logprobs(teacher, [collate([row]) for row in rows], 16):
            store.add(ids, logprobs)
    known = WithTeacher(rows, TeacherTopK(tmp_path))
    batch = collate([known[i] for i in range(len(known))])
    stored = loss_of(student, batch, distillation_topk("forward_kl"))
    assert stored == pytest.approx(taught(engines, topk_of_teacher, k=16), rel=2e-3)
    # Columns stand at the token that they predict: at another place the loss is another.
    moved = replace(batch, columns={n: c.roll(1, 0) for n, c in batch.columns.items()})
    assert loss_of(student, moved, distillation_topk("forward_kl")) > 1.02 * stored


def test_a_store_of_other_samples_is_refused(tmp_path):
    with TopKWriter(tmp_path, k=2, vocab_size=4) as store:
        store.add(torch.tensor([[0, 1]]), torch.tensor([[-0.1, -3.0]]))
    with pytest.raises(UserError, match="a store of 1 documents for 3 samples"):
        WithTeacher(samples(), TeacherTopK(tmp_path))


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path):
    for name, size in (("ours", 265), ("theirs", 268)):
        train_tokenizer(["12+345 12+345 useruser"], size, tmp_path / name)
        (tmp_path / name / "config.json").write_text("{}")
    stage = SimpleNamespace(
        name="distill_on_policy",
        tokenizer=Tokenizer(tmp_path / "ours"),
        config=SimpleNamespace(teacher=str(tmp_path / "ours")),
    )
    assert teacher_folder(stage) == tmp_path / "ours"
    stage.config.teacher = str(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"teacher=.*theirs: its tokenizer gives other ids"):
        teacher_folder(stage)
