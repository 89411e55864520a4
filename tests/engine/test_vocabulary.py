"""Rows of the embedding that no token of the tokenizer has: no mass, no gradient, never sampled."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES, documents
from safetensors.torch import load_file, save_file

from q3mega.algorithms.losses import distillation_topk, normalise, policy_gradient, supervised
from q3mega.config.layout import Layout, check_layout
from q3mega.config.recipe import ModelSpec
from q3mega.data.batch import pack
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.distillation.teaching import hidden_of_teacher
from q3mega.engine import Engine, OptimizerSpec
from q3mega.errors import UserError
from q3mega.model.sizes import rows_for
from q3mega.ops.grpo_loss import Settings as GrpoSettings
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.logprobs import token_logprobs, top_logprobs

IDS, ROWS = 50, 64
SHAPE = SHAPES["dense"]
SPEC = OptimizerSpec(lr=1e-2, steps=10)
TOKENIZER = SimpleNamespace(
    vocab_size=IDS, eos=49, eod=48, think_open=47, think_close=46, encode=lambda text: [45, 46]
)


def with_rows(source: Path, rows: int, folder: Path) -> Path:
    """The model of `source` with so many rows; those that it had not are large, to be seen."""
    folder.mkdir()
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": rows}))
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = torch.full((max(0, rows - ROWS), SHAPE.hidden), 3.0)
        tensors[name] = torch.cat([tensors[name][:rows], grown]).contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    Engine(SHAPE, LAYOUT(), seed=1).save_hf(folder, {})
    return folder


def engine(folder: Path, rows: int, ids: int | None, optimizer=None) -> Engine:
    shape = replace(SHAPE, vocab=rows)
    made = Engine(shape, LAYOUT(), seed=2, optimizer=optimizer, ids=ids)
    made.load_hf(folder)
    return made


def batches(seed=0):
    samples = documents(seed)
    for sample in samples:
        sample.tokens = [token % IDS for token in sample.tokens]
    return pack(normalise(samples), 1000)


@pytest.mark.parametrize("loss", [
    supervised,
    policy_gradient(GrpoSettings(variant="dapo", entropy_coef=0.01)),
    policy_gradient(GrpoSettings(variant="gspo")),
    distillation_topk("reverse_kl"),
])  # fmt: skip
def test_a_padded_model_learns_as_one_without_padding(padded, tmp_path, loss):
    bare = with_rows(padded, IDS, tmp_path / "bare")
    found = []
    for made in (engine(padded, ROWS, IDS, SPEC), engine(bare, IDS, None, SPEC)):
        before = made.chunks[0].output_layer.weight[IDS:].clone()
        for step in (0, 1):
            given = batches(step)
            for batch in given:
                best = torch.arange(8.0).repeat(len(batch), 1)
                batch.columns |= {"teacher_ids": best, "teacher_logprobs": -3 - best / 10}
            metrics = made.train_step(given, loss)
        assert made.chunks[0].output_layer.weight[IDS:].equal(before)
        found.append(metrics)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_only_the_tokenizers_ids_are_sampled(padded):
    model = engine(padded, ROWS, IDS)
    prompts = [[1, 2, 3], [4]]
    groups = InProcessSampler(model, TOKENIZER).generate(prompts, SamplingParams(30, n=8))
    for prompt, group in zip(prompts, groups, strict=True):
        assert max(max(c.tokens) for c in group) < IDS
        scores = token_logprobs(model, [(prompt, c.tokens) for c in group])
        for completion, score in zip(group, scores, strict=True):  # the trainer's distribution
            assert completion.logprobs == pytest.approx(score, abs=1e-5)
    [(ids, logprobs)] = top_logprobs(model, batches(), IDS)
    assert int(ids.max()) < IDS
    assert logprobs.exp().sum(1).tolist() == pytest.approx([1.0] * len(ids), rel=1e-5)


@pytest.mark.parametrize("rows", [IDS, 57, 96])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_teacher_of_other_padding_teaches_the_same(padded, tmp_path, rows, divergence):
    source = tmp_path / "teacher"
    Engine(replace(SHAPE, layers=1), LAYOUT(), seed=5).save_hf(source, {})
    folder = with_rows(source, rows, tmp_path / "other")
    teacher = Engine(replace(SHAPE, layers=1), LAYOUT(), seed=6, ids=IDS)  # the student's rows
    teacher.load_hf(folder)
    student, [batch] = engine(padded, ROWS, IDS), batches()
    config = SimpleNamespace(divergence=divergence, temperature=1.0)
    loss, prepare = hidden_of_teacher(teacher, config)
    prepare([batch])
    [value] = student.evaluate([batch], lambda head, b: float(loss(head, b)[0]))
    p, q = (
        m.evaluate([batch], lambda head, _: head.logits()[:, :IDS].log_softmax(-1))[0]
        for m in (teacher, student)
    )
    mixture = torch.stack([p, q]).logsumexp(0) - torch.tensor(2.0).log()
    terms = p.exp() * (p - q)
    if divergence == "jsd":
        terms = (p.exp() * (p - mixture) + q.exp() * (q - mixture)) / 2
    assert value == pytest.approx(float((terms.sum(-1) * batch.loss_weights).sum()), rel=1e-4)


def test_a_folder_without_rows_for_every_id_is_refused(padded):
    with pytest.raises(UserError, match=r"has 65 ids, the model's embedding 64 rows"):
        engine(padded, ROWS, 65)
    with pytest.raises(UserError, match="has vocab=64 but the recipe's model has vocab=80"):
        engine(padded, 80, 70)


@pytest.mark.parametrize(
    ("ids", "rows"),
    [(151_669, 151_936), (151_936, 151_936), (151_643, 151_680), (151_937, 152_064), (512, 512),
     (267, 384), (1, 128)],
)  # fmt: skip
def test_a_fresh_model_has_rows_that_can_be_shared(ids, rows):
    assert rows_for(ids) == rows


def test_a_tokenizer_of_any_size_gives_a_model_that_tensor_parallelism_divides(tmp_path):
    train_tokenizer(["some text to learn from"] * 9, 267, tmp_path)
    spec = ModelSpec(layers=2, hidden=64, heads=8, kv_heads=8, head_dim=8, ffn=128)
    shape = spec.shape(Tokenizer(tmp_path).vocab_size)
    for tensor in (2, 4, 8):
        check_layout(Layout(processes=tensor, tensor=tensor), shape)
        assert shape.vocab % tensor == 0


def test_a_tokenizer_that_leaves_ids_out_has_as_many_as_its_last(tmp_path):
    train_tokenizer(["some text to learn from"] * 9, 267, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["!"] = 400
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("!") == [400] and tokenizer.vocab_size == 401
