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


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folders = {}
    for kind in ("dense", "tied", "moe"):
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        Engine(SHAPES[kind], LAYOUT(), seed=3).save_hf(folders[kind], {})
    return folders


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "layout", "share"),
    [
        ("dense", {"tensor": 2}, [PROMPTS]),
        ("tied", {"tensor": 2, "sequence_parallel": True}, [PROMPTS]),
        ("moe", {"tensor": 2, "expert": 2, "sequence_parallel": True}, [PROMPTS]),
        ("moe", {"expert": 2}, [PROMPTS[:4], PROMPTS[4:]]),
        ("moe", {"expert": 2}, [[], PROMPTS]),  # a rank with nothing to do keeps step
    ],
)
def test_tokens_are_those_of_one_process(torchrun, weights, kind, layout, share):
    alone = torchrun(SCRIPT, 1, '{"processes": 1}', kind, weights[kind], json.dumps([PROMPTS]))
    text = json.dumps({"processes": 2, **layout})
    found = torchrun(SCRIPT, 2, text, kind, weights[kind], json.dumps(share))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
    for (_, got), (_, expected) in zip(found, alone, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    assert len({len(tokens) for tokens, _ in alone}) > 1
