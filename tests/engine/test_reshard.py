"""A checkpoint of one layout, loaded under another, takes the same next step."""

import json

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES

from q3mega.engine import Engine

SEQUENCE = {"tensor": 2, "sequence_parallel": True}
PAIRS = [
    ("tied", {}, 1, {"pipeline": 2}, 2),
    ("tied", SEQUENCE, 2, {}, 1),
    ("odd", SEQUENCE, 2, {}, 1),
    ("odd", {}, 1, SEQUENCE, 2),
    ("tied", {"pipeline": 2}, 2, {"context": 2}, 2),
    ("tied", {"pipeline": 2}, 2, SEQUENCE, 2),
    ("tied", {}, 2, SEQUENCE, 2),
    ("deep", {"pipeline": 2, "virtual_pipeline": 2}, 2, {}, 1),
    ("moe", {"expert": 2}, 2, {"expert": 2, **SEQUENCE}, 2),
    ("moe", {"expert": 2}, 2, {}, 1),
]


def name(kind, before, ranks_before, after, ranks_after):
    """A checkpoint and who loads it."""
    layouts = {"processes": ranks_before, **before}, {"processes": ranks_after, **after}
    return json.dumps([kind, *layouts])


@pytest.fixture(scope="module")
def steps(torchrun, tmp_path_factory):
    """name(...) -> the third step; every layout also loads what it saved itself."""
    initial = {}
    for kind in {pair[0] for pair in PAIRS}:
        initial[kind] = str(tmp_path_factory.mktemp(kind))
        Engine(SHAPES[kind], LAYOUT(), seed=3).save_hf(initial[kind], {})
    loads = {name(*p) for p in PAIRS} | {name(*p[:3], *p[1:3]) for p in PAIRS}
    saves = {json.dumps(json.loads(n)[:2]) for n in loads}
    folders = {n: str(tmp_path_factory.mktemp("checkpoints")) for n in saves}
    results = {}
    for what, names in (("save", sorted(saves)), ("load", sorted(loads))):
        for ranks in (1, 2):
            names_of_ranks = [n for n in names if json.loads(n)[-1]["processes"] == ranks]
            cases = []
            for kind, before, *after in map(json.loads, names_of_ranks):
                folder = folders[json.dumps([kind, before])]
                cases.append([kind, (after or [before])[0], initial[kind], folder])
            results |= zip(
                names_of_ranks,
                torchrun("reshard_ranks.py", ranks, what, json.dumps(cases)),
                strict=True,
            )
    return results


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "before", "ranks_before", "after", "ranks_after"), PAIRS)
def test_the_next_step_is_the_same(steps, kind, before, ranks_before, after, ranks_after):
    own = steps[name(kind, before, ranks_before, before, ranks_before)]
    other = steps[name(kind, before, ranks_before, after, ranks_after)]
    near = {"rel": 1e-4 if kind == "moe" else 1e-5}
    assert other["step"] == pytest.approx(own["step"], **near)
    assert other["weights"] == pytest.approx(own["weights"], **near)
