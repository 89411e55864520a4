"""Small shapes and random documents for the engine's tests."""

import json
import os
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from safetensors import safe_open

from q3mega.config.layout import Layout
from q3mega.data.batch import Sample
from q3mega.model import Qwen3Shape

SHAPE = partial(
    Qwen3Shape,
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    ffn=64,
    head_dim=16,
    vocab=64,
    rope_base=1e4,
)
SHAPES = {
    "dense": SHAPE(tied=False),
    "tied": SHAPE(tied=True),
    "deep": SHAPE(tied=False, layers=4),
    "moe": SHAPE(tied=False, experts=4, topk=2, moe_ffn=32, router_aux_loss_coef=0.2),
    "odd": SHAPE(tied=True, vocab=67),  # rows that two ranks cannot share, more than the 64 ids
}
LAYOUT = partial(Layout, processes=1)


def documents(seed: int, n: int = 10) -> list[Sample]:
    """Uneven documents with RL columns; the first tokens of each carry no loss."""
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        length = rng.randint(5, 40)
        tokens = [rng.randrange(64) for _ in range(length)]
        prompt = rng.randint(1, 4)
        columns = {
            "advantages": [rng.choice((-1.0, 1.0))] * length,
            "old_logprobs": [-4.0 - rng.random() for _ in range(length)],
        }
        out.append(Sample(tokens, [0.0] * prompt + [1.0] * (length - prompt), columns))
    return out


def weights(engine) -> dict[str, float]:
    """The sum of squares of each tensor that the engine hands over; every rank calls."""
    run = f"{os.environ.get('MASTER_PORT', 0)}-{os.getppid()}"  # torchrun's, the same on all ranks
    folder = Path(tempfile.gettempdir()) / f"q3mega-weights-{run}"
    engine.save_hf(folder, {})
    sums = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                sums[name] = float(tensors.get_tensor(name).double().square().sum())
    return dict(sorted(sums.items()))


def run_cases(fn: Callable, cases: str) -> None:
    """Under torchrun: fn(*case) for each of a JSON list, a layout each; rank 0 prints them all."""
    torch.set_num_threads(1)
    found = []
    for case in json.loads(cases):
        found.append(fn(*case))
        ps.destroy_model_parallel()
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
