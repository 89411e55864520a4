"""Multi-turn episodes: sample, let the environment answer, sample on. Token ids stay throughout.

The chat template would rewrite earlier turns, so nothing is rendered twice: the environment's
turn is appended as tokens with mask 0, and the next assistant turn continues from there.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from q3mega.data.chat import EMPTY_THINKING, render
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import parallel
from q3mega.environments.tools import Environment
from q3mega.model.routing import continued
from q3mega.rollout.base import Completion, Sampler, SamplingParams, merge_versions


def run_episodes(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    environments: Sequence[Environment | None],
    params: SamplingParams,
) -> list[tuple[Completion, list[str]]]:
    """For each prompt, one episode as a single completion, and its assistant turns as text.

    An environment ends its episode, after at most tools.MAX_STEPS turns and one. params.max_tokens
    are a turn's. Where the empty think block is pre-filled in a prompt, it is in later turns too.
    """
    block = tokenizer.encode(EMPTY_THINKING)
    done = [Completion([], [], [], "stop") for _ in prompts]
    turns: list[list[str]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    turn = 0
    while parallel.most_of_experts(len(active)):  # with none left other ranks may go on
        asked = [list(prompts[i]) + done[i].tokens for i in active]
        sampled = sampler.generate(asked, replace(params, n=1, seed=params.seed + turn))
        stopped = []
        for i, (new,) in zip(active, sampled, strict=True):
            _extend(done[i], new.tokens, new.logprobs, new.mask)
            done[i].finish_reason = new.finish_reason
            done[i].weight_versions = merge_versions(done[i].weight_versions + new.weight_versions)
            done[i].routes = continued(done[i].routes, new.routes)
            whole = new.finish_reason == "stop"
            turns[i].append(tokenizer.decode(new.tokens[:-1] if whole else new.tokens))
            if whole:
                stopped.append(i)
        said = parallel.from_first(
            partial(_step, [(environments[i], turns[i][-1]) for i in stopped])
        )
        active = []
        for i, messages in zip(stopped, said, strict=True):
            if messages:
                filled = list(prompts[i][-len(block) :]) == block
                think = False if filled else None
                text = render(messages, add_generation_prompt=True, enable_thinking=think)
                following = tokenizer.encode("\n" + text)
                _extend(done[i], following, [0.0] * len(following), [0] * len(following))
                active.append(i)
        turn += 1
    return list(zip(done, turns, strict=True))


def _step(
    acts: Sequence[tuple[Environment | None, str]],
) -> list[list[dict[str, Any]] | None]:
    """What each environment says to its assistant's turn."""
    return [environment.step(text) if environment else None for environment, text in acts]


def _extend(to: Completion, tokens: list[int], logprobs: list[float], mask: list[int]) -> None:
    to.tokens += tokens
    to.logprobs += logprobs
    to.mask += mask
