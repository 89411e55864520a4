"""Episodes on two ranks whose tools answer differently; rank 0 prints every rank's.

Run by test_episode_layouts.py: `torchrun acting.py CASES`, a JSON list of [layout, numbers of steps
of each data-parallel rank's environments].
"""

import os
import sys
from types import SimpleNamespace

from q3mega import device  # noqa: F401

# isort: split

from helpers.tiny_models import LAYOUT, run_cases
from q3mega.engine import parallel
from q3mega.environments.environment import Environment
from q3mega.problems import generate
from q3mega.problems.generated.general import call
from q3mega.rollout import Completion, SamplingParams
from q3mega.rollout.episodes import run_episodes

TOKENIZER = SimpleNamespace(
    encode=lambda text: list(map(ord, text)), decode=lambda tokens: "".join(map(chr, tokens))
)
CALL = call("calculator", "expression", "1+1")


class Caller:
    """A sampler that always calls, and counts how often it is asked."""

    asked = 0

    def generate(self, prompts, params):
        self.asked += 1
        tokens = [*map(ord, CALL), 0]
        ones = [1] * len(tokens)
        return [[Completion(list(tokens), [0.0] * len(tokens), ones, "stop")] for _ in prompts]


def act(layout: dict, steps: list) -> list:
    parallel.initialise(LAYOUT(**layout), 0)
    (problem,) = generate("calculator", 1, seed=0)
    worlds = [Environment(problem, max_steps=n) for n in steps[parallel.data_rank()]]
    for world in worlds:
        world.tools["calculator"] = SimpleNamespace(call=lambda arguments: os.environ["RANK"])
    sampler = Caller()
    done = run_episodes(sampler, TOKENIZER, [[65]] * len(worlds), worlds, SamplingParams(99))
    texts = [TOKENIZER.decode(completion.tokens) for completion, _ in done]
    return parallel.gather_over_all([(sampler.asked, texts)])


if __name__ == "__main__":
    run_cases(act, sys.argv[1])
