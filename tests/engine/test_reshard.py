"""A checkpoint of one layout, loaded under another, takes the same next step."""

import json

import pytest

from q3mega import device  # noqa: F401

# isort: split
from tiny import LAYOUT, SHAPES

from q3mega.engine import Engine

SEQUENCE = {"tensor": 2, "sequence_parallel": True}
PAIRS = [
    ("tied", {}, 1, {"pipeline": 2}, 2),
    ("tied", SEQUENCE, 2, {}, 1),
    ("tied", {"pipeline": 2}, 2, {"context": 2}, 2),
    ("tied", {"pipeline": 2}, 2, SEQUENCE, 2),
    ("tied", {}, 2, SEQUENCE, 2),
    ("deep", {"pipeline": 2, "virtual_pipeline": 2}, 2, {}, 1),
    ("moe", {"expert": 2}, 2, {"expert": 2, **SEQUENCE}, 2),
    ("moe", {"expert": 2}, 2, {}, 1),
]


@pytest.fixture(scope="module")
def saved(torchrun, tmp_path_factory):
    """saved(kind, layout, processes) -> a folder with weights and a checkpoint after two steps."""
    weights, found = {}, {}

    def folder(kind, layout, processes):
        if kind not in weights:
            weights[kind] = str(tmp_path_factory.mktemp(kind))
            Engine(SHAPES[kind], LAYOUT(), seed=3).save_hf(weights[kind], {})
        text = json.dumps({"processes": processes, **layout})
        if (kind, text) not in found:
            found[kind, text] = str(tmp_path_factory.mktemp("checkpoints"))
            given = "save", text, kind, weights[kind], found[kind, text]
            torchrun("reshard.py", processes, *given)
        return weights[kind], found[kind, text]

    return folder


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "before", "ranks_before", "after", "ranks_after"), PAIRS)
def test_the_next_step_is_the_same(torchrun, saved, kind, before, ranks_before, after, ranks_after):
    folders = saved(kind, before, ranks_before)
    steps = []
    for layout, ranks in ((before, ranks_before), (after, ranks_after)):
        text = json.dumps({"processes": ranks, **layout})
        steps.append(torchrun("reshard.py", ranks, "load", text, kind, *folders))
    near = {"rel": 1e-4 if kind == "moe" else 1e-5}
    assert steps[1]["steps"][0] == pytest.approx(steps[0]["steps"][0], **near)
    assert steps[1]["weights"] == pytest.approx(steps[0]["weights"], **near)
