"""Run under torchrun: samples from a server under each layout of argv, prints what ranks got."""

import sys
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split

from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES, run_cases
from q3mega.engine import Engine, parallel
from q3mega.rollout import SamplingParams
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync.sampler import WeightSyncedSampler


def cut_at(place: int):
    """An Engine.tensors in which a transfer is cut."""
    whole = Engine.tensors

    def cut(engine):
        for i, pair in enumerate(whole(engine)):
            if i == place:
                raise KeyboardInterrupt
            yield pair

    return cut


def sample(
    layout: dict, weights: str, kind: str, url: str, folder: str | None, prompts: list
) -> list:
    """folder: that hands weights over; None: they are broadcast."""
    engine = Engine(SHAPES["dense"], LAYOUT(**layout), seed=3)
    engine.load_hf(weights)
    servers = ServerSampler([url], TOKENIZER, kind=kind)
    sampler = WeightSyncedSampler(engine, servers, Path(folder) if folder else None)
    mine = list(range(len(prompts)))[parallel.data_rank() :: parallel.data_size()]
    found = sampler.generate([prompts[i] for i in mine], SamplingParams(12, temperature=0))
    return parallel.gather_over_all(
        [(i, c.tokens, c.weight_versions) for i, (c,) in zip(mine, found, strict=True)]
    )


if __name__ == "__main__":
    run_cases(sample, sys.argv[1])
