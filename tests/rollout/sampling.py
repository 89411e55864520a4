"""Samples under one layout; rank 0 prints every rank's tokens and log-probabilities.

Run by test_layouts.py: `torchrun sampling.py '{"tensor": 2}' moe WEIGHTS PROMPTS`, where rank r of
the data-parallel ranks takes PROMPTS[r].
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from q3mega import device  # noqa: F401

# isort: split
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent.parent / "engine"))
from tiny import LAYOUT, SHAPES

from q3mega.engine import Engine, parallel
from q3mega.rollout import SamplingParams
from q3mega.rollout.in_process import InProcessSampler

TOKENIZER = SimpleNamespace(
    eos=63, eod=62, think_open=61, think_close=60, encode=lambda text: [50, 51, 60]
)


def main() -> None:
    layout, kind, weights, prompts = sys.argv[1:]
    torch.set_num_threads(1)
    engine = Engine(SHAPES[kind], LAYOUT(**json.loads(layout)), seed=3)
    engine.load_hf(weights)
    for parameter in engine.chunks[0].parameters():
        parameter.data *= 2  # away from uniform, so that some end early
    sampler = InProcessSampler(engine, TOKENIZER, max_batch=3)
    mine = json.loads(prompts)[parallel.data_rank()]
    found = sampler.generate(mine, SamplingParams(24, temperature=0, n=1, seed=1))
    rows = [(c.tokens, c.logprobs) for (c,) in found]
    every = parallel.gather_over_data(rows)
    if dist.get_rank() == 0:
        print(json.dumps(every))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
