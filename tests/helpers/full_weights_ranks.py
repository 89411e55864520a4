"""Run under torchrun: the engine's tensors on rank 0 under each layout of argv, against a folder.

Prints for each their number and the names that are missing, in excess, or other than the folder's:
of the weights that an engine with the folder's seed draws, and of those loaded from it.
"""

import sys
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
import torch
from safetensors.torch import load_file

from helpers.tiny_models import LAYOUT, SHAPES, run_cases
from q3mega.engine import Engine


def compare(kind: str, layout: dict, folder: str) -> list:
    fresh = Engine(SHAPES[kind], LAYOUT(processes=2, **layout), seed=3)
    loaded = Engine(SHAPES[kind], LAYOUT(processes=2, **layout), seed=7, fresh=False)
    loaded.load_hf(folder)
    return [differences(engine, folder) for engine in (fresh, loaded)]


def differences(engine: Engine, folder: str) -> list:
    found = list(engine.tensors())
    if torch.distributed.get_rank():
        assert not found
    expected = load_file(Path(folder) / "model.safetensors")
    got = dict(found)
    wrong = [n for n in got if n in expected and not torch.equal(got[n], expected[n])]
    return [len(found), sorted(expected.keys() ^ got.keys()), wrong]


if __name__ == "__main__":
    run_cases(compare, sys.argv[1])
