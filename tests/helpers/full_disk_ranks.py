"""A save that fails on one of two ranks; each says in a word how it ended.

Run by test_engine.py under torchrun.
"""

import resource
import sys
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
import torch.distributed as dist

from helpers.tiny_models import LAYOUT, SHAPES, documents, run_cases
from q3mega.algorithms.losses import normalise, supervised
from q3mega.engine import Engine, OptimizerSpec, parallel
from q3mega.engine.parallel import shard_by_length
from q3mega.errors import UserError


def save(folder: str) -> list[str]:
    spec = OptimizerSpec(lr=1e-2, steps=10)
    engine = Engine(SHAPES["tied"], LAYOUT(processes=2), seed=1, optimizer=spec)
    engine.train_step(shard_by_length(normalise(documents(0)), 96), supervised)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))  # bytes of a file
    engine.save(Path(folder), 1, {})
    try:
        engine.finish_saving()
        ended = "published"
    except UserError as error:
        ended = "refused" if "could not be written" in str(error) else str(error)
    return parallel.gather_over_all([ended])


if __name__ == "__main__":
    run_cases(save, sys.argv[1])
