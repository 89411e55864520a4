"""Samples under each of some layouts; rank 0 prints every rank's tokens and log-probabilities.

Run by test_sampling_layouts.py: `torchrun sampling.py CASES`, a JSON list of [kind, layout, folder
of weights, prompts], where rank r of the data-parallel ranks takes prompts[r].
"""

import sys

from q3mega import device  # noqa: F401

# isort: split

from helpers.stand_in_tokenizer import TOKENIZER
from helpers.tiny_models import LAYOUT, SHAPES, run_cases
from q3mega.engine import Engine, parallel
from q3mega.rollout import Completion, SamplingParams
from q3mega.rollout.in_process import InProcessSampler


def sample(kind: str, layout: dict, weights: str, prompts: list) -> list:
    engine = Engine(SHAPES[kind], LAYOUT(**layout), seed=3)
    engine.load_hf(weights)
    for parameter in engine.chunks[0].parameters():
        parameter.data *= 2  # away from uniform, so that some end early
    sampler = InProcessSampler(engine, TOKENIZER, max_batch=3)
    params = SamplingParams(24, temperature=0, n=1, seed=1, routes=kind == "moe")
    found = sampler.generate(prompts[parallel.data_rank()], params)
    return parallel.gather_over_data([(c.tokens, c.logprobs, experts(c)) for (c,) in found])


def experts(completion: Completion) -> list | None:
    """Of each fed token and layer, in one order."""
    if completion.routes is None:
        return None
    return completion.routes.unflatten(1, (-1, SHAPES["moe"].topk)).sort(-1).values.tolist()


if __name__ == "__main__":
    run_cases(sample, sys.argv[1])
