"""The in-process sampler draws the same under every layout that it takes."""

import json
from pathlib import Path

import pytest

from q3mega import device  # noqa: F401

# isort: split
from tiny import LAYOUT, SHAPES

from q3mega.engine import Engine

SCRIPT = str(Path(__file__).with_name("sampling.py"))
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
    one, two = (torchrun(SCRIPT, n, json.dumps(cases)) for n, cases in ((1, alone), (2, cut)))
    return two, dict(zip(folders, one, strict=True))


@pytest.mark.dist
@pytest.mark.parametrize("case", range(len(CASES)))
def test_tokens_are_those_of_one_process(samples, case):
    found, alone = samples[0][case], samples[1][CASES[case][0]]
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
    for (_, got), (_, expected) in zip(found, alone, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.dist
def test_some_end_before_others(samples):
    assert len({len(tokens) for tokens, _ in samples[1]["dense"]}) > 1
