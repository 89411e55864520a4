"""The in-process sampler against transformers' greedy decoding and the trainer's logprobs."""

from collections import Counter

import pytest
import torch

from q3mega import device  # noqa: F401

# isort: split
from dataclasses import replace

from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from transformers import AutoModelForCausalLM

from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.model.sizes import Yarn
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.logprobs import token_logprobs

# ids of a make-believe tokenizer over 64 tokens; the stop text closes the think block
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 12]]


@pytest.fixture(params=SHAPES)
def engine(request):
    return Engine(SHAPES[request.param], LAYOUT(), seed=5, ids=64)


def test_greedy_text_is_that_of_transformers(engine, tmp_path):
    engine.save_hf(tmp_path, {"eos_token_id": 63, "pad_token_id": 62})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = InProcessSampler(engine, TOKENIZER).generate(PROMPTS, SamplingParams(12, temperature=0))
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[63, 62]
        )
        assert out[0, len(prompt) :].tolist() == completion.tokens


def test_log_probabilities_are_the_trainers(engine):
    sampler = InProcessSampler(engine, TOKENIZER)
    sampled = sampler.generate(PROMPTS, SamplingParams(20, n=3, seed=7))
    pairs = [(p, c.tokens) for p, group in zip(PROMPTS, sampled, strict=True) for c in group]
    trainer = token_logprobs(engine, pairs)
    for own, (completion) in zip(trainer, [c for group in sampled for c in group], strict=True):
        assert completion.logprobs == pytest.approx(own, abs=1e-5)


def test_a_sequence_does_not_depend_on_its_company(engine):
    params = SamplingParams(16, seed=3)
    together = InProcessSampler(engine, TOKENIZER).generate(PROMPTS, params)
    in_rounds = InProcessSampler(engine, TOKENIZER, max_batch=2).generate(PROMPTS, params)
    assert [g[0].tokens for g in together] == [g[0].tokens for g in in_rounds]
    other = InProcessSampler(engine, TOKENIZER).generate(PROMPTS, replace(params, seed=4))
    assert [g[0].tokens for g in together] != [g[0].tokens for g in other]


def test_sampled_frequencies_are_the_models():
    engine = Engine(SHAPES["dense"], LAYOUT(), seed=5)
    for parameter in engine.chunks[0].parameters():
        parameter.data *= 3  # away from uniform
    sampler = InProcessSampler(engine, TOKENIZER, max_batch=4000)
    (group,) = sampler.generate([[1, 2]], SamplingParams(1, n=4000, seed=1))
    counts = Counter(c.tokens[0] for c in group)
    expected = {c.tokens[0]: torch.tensor(c.logprobs[0]).exp().item() for c in group}
    for token, p in expected.items():
        assert counts[token] / 4000 == pytest.approx(
            p, abs=4.5 * (p * (1 - p) / 4000) ** 0.5 + 1e-3
        )
    (nucleus,) = sampler.generate([[1, 2]], SamplingParams(1, n=500, top_k=3, seed=1))
    best = sorted(expected, key=expected.get, reverse=True)[:3]
    assert {c.tokens[0] for c in nucleus} <= set(best)


def test_the_thinking_budget_closes_an_open_block():
    engine = Engine(SHAPES["dense"], LAYOUT(), seed=5)
    sampler = InProcessSampler(engine, TOKENIZER)
    params = SamplingParams(30, thinking_budget=6, seed=2, n=8)
    for completion in sampler.generate([[1, 2, 61], [1, 2]], params)[0]:
        mask = completion.mask
        if 60 in completion.tokens[:6]:
            continue  # closed by itself
        assert completion.tokens[6:9] == [50, 51, 60]
        assert mask[:9] == [1] * 6 + [0] * 3
        assert set(mask[9:]) <= {1}
        assert sum(mask) <= 30


def test_no_think_block_no_budget():
    engine = Engine(SHAPES["dense"], LAYOUT(), seed=5)
    (group,) = InProcessSampler(engine, TOKENIZER).generate(
        [[1, 2]], SamplingParams(30, thinking_budget=2, n=16)
    )
    for completion in group:
        if completion.tokens[0] != 61:
            assert set(completion.mask) == {1}


def test_dual_chunk_decode_equals_its_prefill():
    engine = Engine(SHAPES["dense"], LAYOUT(), seed=5)
    engine.positions = replace(engine.positions, chunk_size=6, local_size=2, yarn=Yarn(4.0, 8))
    sampled = InProcessSampler(engine, TOKENIZER).generate(PROMPTS, SamplingParams(25, seed=7))
    pairs = [(p, c.tokens) for p, (c,) in zip(PROMPTS, sampled, strict=True)]
    for own, (completion,) in zip(token_logprobs(engine, pairs), sampled, strict=True):
        assert completion.logprobs == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0"),
    ],
)
def test_bad_parameters_are_named(bad, field):
    with pytest.raises(UserError, match=field):
        SamplingParams(**({"max_tokens": 4} | bad))
