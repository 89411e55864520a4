"""Every layout is the same model: losses, gradient norms and weights against one process."""

import json

import pytest

from q3mega import device  # noqa: F401

# isort: split
from tiny import LAYOUT, SHAPES

from q3mega.engine import Engine

CASES = [
    ("dense", {"tensor": 2}, 2),
    ("dense", {"tensor": 2, "sequence_parallel": True}, 2),
    ("tied", {"pipeline": 2}, 2),
    ("dense", {"distributed_optimizer": False}, 2),
    ("tied", {}, 2),
    ("dense", {"context": 2}, 2),
    ("deep", {"pipeline": 2, "virtual_pipeline": 2}, 2),
    ("deep", {"pipeline": 3}, 3),  # embedding and lm_head counted as layers
    ("moe", {"expert": 2}, 2),
    ("moe", {}, 2),
    ("dense", {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 4),
    ("dense", {"tensor": 2, "context": 2, "sequence_parallel": True}, 4),
    ("moe", {"tensor": 2, "expert": 2, "sequence_parallel": True}, 2),
    ("moe", {"tensor": 2, "expert_tensor": 2, "sequence_parallel": True}, 2),
    ("moe", {"pipeline": 2, "expert": 2, "context": 2}, 4),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """kind -> a Hugging Face folder with the weights that every layout starts from."""
    folders = {}
    for kind, shape in SHAPES.items():
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        Engine(shape, LAYOUT(), seed=3).save_hf(folders[kind], {})
    return folders


@pytest.fixture(scope="module")
def alone(torchrun, weights):
    cache: dict[tuple[str, str], dict] = {}

    def result(kind: str, loss: str) -> dict:
        if (kind, loss) not in cache:
            cache[kind, loss] = torchrun("layouts.py", 1, "{}", kind, loss, weights[kind])
        return cache[kind, loss]

    return result


def close(got: dict, want: dict, tolerance: float) -> bool:
    steps = [x for step in got["steps"] for x in step], [x for step in want["steps"] for x in step]
    weights = list(got["weights"].values()), list(want["weights"].values())
    assert list(got["weights"]) == list(want["weights"])
    return steps[0] == pytest.approx(steps[1], rel=tolerance) and weights[0] == pytest.approx(
        weights[1], rel=tolerance
    )


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "layout", "processes"), CASES)
def test_a_layout_is_the_same_model(torchrun, alone, weights, kind, layout, processes):
    layout = {"processes": processes, **layout}
    got = torchrun("layouts.py", processes, json.dumps(layout), kind, "supervised", weights[kind])
    assert close(got, alone(kind, "supervised"), 1e-4 if kind == "moe" else 1e-5)


@pytest.mark.dist
@pytest.mark.parametrize("loss", ["policy", "gspo", "distill"])
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"context": 2}, {}])
def test_the_other_losses_are_the_same_too(torchrun, alone, weights, layout, loss):
    layout = json.dumps({"processes": 2, **layout})
    got = torchrun("layouts.py", 2, layout, "dense", loss, weights["dense"])
    assert close(got, alone("dense", loss), 1e-5)


@pytest.mark.dist
def test_a_wrong_normaliser_is_seen(torchrun, alone, weights):
    got = torchrun(
        "layouts.py",
        2,
        json.dumps({"processes": 2}),
        "dense",
        "supervised",
        weights["dense"],
        "wrong",
    )
    assert not close(got, alone("dense", "supervised"), 1e-2)
