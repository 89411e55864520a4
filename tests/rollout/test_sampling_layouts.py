"""Sampling under every layout that takes it: the same tokens, in process and from servers."""

import json

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES
from helpers.token_server import token_server

from q3mega.engine import Engine
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15, 16], [61], [17, 61]]


CASES = [
    ("dense", {"tensor": 2}, [PROMPTS]),
    ("tied", {"tensor": 2, "sequence_parallel": True}, [PROMPTS]),
    ("moe", {"tensor": 2, "expert": 2, "sequence_parallel": True}, [PROMPTS]),
    ("moe", {"expert": 2}, [PROMPTS[:4], PROMPTS[4:]]),
    ("moe", {"expert": 2}, [[], PROMPTS]),  # a rank with nothing to do keeps step
]


@pytest.fixture(scope="module")
def samples(torchrun, tmp_path_factory):
    """(those of two processes for each of CASES, kind -> those of one)."""
    folders = {}
    for kind in ("dense", "tied", "moe"):
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        Engine(SHAPES[kind], LAYOUT(), seed=3).save_hf(folders[kind], {})
    alone = [(kind, {"processes": 1}, folders[kind], [PROMPTS]) for kind in folders]
    cut = [(kind, {"processes": 2, **layout}, folders[kind], p) for kind, layout, p in CASES]
    one, two = (
        torchrun("sampling_ranks.py", n, json.dumps(cases)) for n, cases in ((1, alone), (2, cut))
    )
    return two, dict(zip(folders, one, strict=True))


@pytest.mark.dist
@pytest.mark.parametrize("case", range(len(CASES)))
def test_tokens_are_those_of_one_process(samples, case):
    found, alone = samples[0][case], samples[1][CASES[case][0]]
    assert [tokens for tokens, *_ in found] == [tokens for tokens, *_ in alone]
    for (_, got, routes), (_, expected, own) in zip(found, alone, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
        assert routes == own and (routes is None) == (CASES[case][0] != "moe")


@pytest.mark.dist
def test_some_end_before_others(samples):
    assert len({len(tokens) for tokens, *_ in samples[1]["dense"]}) > 1


@pytest.mark.dist
def test_servers_get_the_weights_from_every_layout_and_answer_every_rank(torchrun, tmp_path):
    trained = Engine(SHAPES["dense"], LAYOUT(), seed=3)
    for parameter in trained.chunks[0].parameters():
        parameter.data *= 2
    trained.save_hf(tmp_path / "hf", {})
    params = SamplingParams(12, temperature=0)
    groups = InProcessSampler(trained, TOKENIZER).generate(PROMPTS, params)
    expected = [c.tokens for (c,) in groups]
    layouts: list[dict] = [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}]
    with token_server(Engine(SHAPES["dense"], LAYOUT(), seed=4)) as server:
        cases = [
            (
                {"processes": 2, **way},
                str(tmp_path / "hf"),
                "vllm",
                server.url,
                str(tmp_path / str(i)),
                PROMPTS,
            )
            for i, way in enumerate(layouts)
        ]
        answers = torchrun("weight_sync_ranks.py", 2, json.dumps(cases))
        asked = len(server.asked)
    assert asked == len(layouts) * len(PROMPTS)  # once for the ranks that share a model
    for way, got in zip(layouts, answers, strict=True):
        assert len(got) == len(PROMPTS) * (2 if way else 1)
        assert all(tokens == expected[i] for i, tokens, _ in got)
        assert len({version for *_, runs in got for version, _ in runs}) == 1
