"""Every layout is the same model: losses, gradient norms and weights against one process."""

import json

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.layout_ranks import steps
from helpers.tiny_models import LAYOUT, SHAPES
from safetensors.torch import load_file

from q3mega.engine import Engine

CASES = [
    ("dense", {"tensor": 2}, 2),
    ("dense", {"tensor": 2, "sequence_parallel": True}, 2),
    ("tied", {"pipeline": 2}, 2),
    ("dense", {"distributed_optimizer": False}, 2),
    ("tied", {}, 2),
    ("dense", {"context": 2}, 2),
    ("deep", {"pipeline": 2, "virtual_pipeline": 2}, 2),
    ("odd", {"tensor": 2, "sequence_parallel": True}, 2),
    ("deep", {"pipeline": 3}, 3),  # embedding and lm_head counted as layers
    ("moe", {"expert": 2}, 2),
    ("moe", {}, 2),
    ("dense", {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 4),
    ("dense", {"tensor": 2, "context": 2, "sequence_parallel": True}, 4),
    ("moe", {"tensor": 2, "expert": 2, "sequence_parallel": True}, 2),
    ("moe", {"tensor": 2, "expert_tensor": 2, "sequence_parallel": True}, 2),
    ("moe", {"pipeline": 2, "expert": 2, "context": 2}, 4),
]


LOSSES = [
    ("dense", layout, 2, loss)
    for loss in ("policy", "gspo", "distill")
    for layout in ({"tensor": 2}, {"context": 2}, {})
]
ALL = [*((kind, layout, ranks, "supervised") for kind, layout, ranks in CASES), *LOSSES]


def name(kind, layout, ranks, loss, wrong=False):
    return json.dumps([kind, {"processes": ranks, **layout}, loss, wrong])


@pytest.fixture(scope="module")
def results(torchrun):
    """name(...) -> what rank 0 saw; one launch for all cases of as many ranks, none for one."""
    alone = {(kind, loss) for kind, _, _, loss in ALL}
    cases = [*ALL, *((kind, {}, 1, loss) for kind, loss in sorted(alone))]
    named = [name(*case) for case in cases] + [name("dense", {}, 2, "supervised", wrong=True)]
    found = {}
    for ranks in sorted({json.loads(n)[1]["processes"] for n in named}):
        mine = [n for n in named if json.loads(n)[1]["processes"] == ranks]
        full = [json.loads(n) for n in mine]
        one = ranks == 1  # this process is as good as one of torchrun's
        launched = (
            [steps(*c) for c in full]
            if one
            else torchrun("layout_ranks.py", ranks, json.dumps(full))
        )
        found |= zip(mine, launched, strict=True)
    return found


def close(got: dict, want: dict, tolerance: float) -> bool:
    assert got["skipped"] == want["skipped"] == 1
    steps = [x for step in got["steps"] for x in step], [x for step in want["steps"] for x in step]
    weights = list(got["weights"].values()), list(want["weights"].values())
    assert list(got["weights"]) == list(want["weights"])
    return steps[0] == pytest.approx(steps[1], rel=tolerance) and weights[0] == pytest.approx(
        weights[1], rel=tolerance
    )


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "layout", "ranks", "loss"), ALL)
def test_a_layout_is_the_same_model(results, kind, layout, ranks, loss):
    got, alone = results[name(kind, layout, ranks, loss)], results[name(kind, {}, 1, loss)]
    assert close(got, alone, 1e-4 if kind == "moe" else 1e-5)


@pytest.mark.dist
def test_a_wrong_normaliser_is_seen(results):
    got = results[name("dense", {}, 2, "supervised", wrong=True)]
    assert not close(got, results[name("dense", {}, 1, "supervised")], 1e-2)


@pytest.mark.dist
def test_every_layout_draws_and_loads_the_same_weights_and_rank_0_gets_them_whole(
    torchrun, tmp_path
):
    layouts = [
        ("dense", {"tensor": 2}),
        ("deep", {"pipeline": 2}),
        ("tied", {"pipeline": 2}),
        ("odd", {"tensor": 2}),
        ("deep", {"pipeline": 2, "virtual_pipeline": 2}),
        ("moe", {"expert": 2}),
        ("moe", {"pipeline": 2}),
        ("moe", {"tensor": 2, "expert": 2, "sequence_parallel": True}),
        ("moe", {"tensor": 2, "expert_tensor": 2, "sequence_parallel": True}),
        ("dense", {"context": 2}),
        ("dense", {}),
    ]
    counts = {}
    for kind in ("dense", "deep", "tied", "moe", "odd"):
        Engine(SHAPES[kind], LAYOUT(), seed=3).save_hf(tmp_path / kind, {})
        tensors = load_file(tmp_path / kind / "model.safetensors")
        counts[kind] = len(tensors)
        matrices = [x for x in tensors.values() if x.dim() == 2]
        assert len({float(x.double().sum()) for x in matrices}) == len(matrices)  # none is a copy
    cases = [(kind, layout, str(tmp_path / kind)) for kind, layout in layouts]
    differences = torchrun("full_weights_ranks.py", 2, json.dumps(cases))
    assert differences == [[[counts[kind], [], []]] * 2 for kind, _ in layouts]
