"""Multi-turn episodes: sample, let the environment answer, sample on. Token ids stay throughout.

The chat template would rewrite earlier turns, so nothing is rendered twice: the environment's
turn is appended as tokens with mask 0, and the next assistant turn continues from there.
"""

from collections.abc import Sequence
from dataclasses import replace

from q3mega.data.chat import render
from q3mega.data.tokenizer import Tokenizer
from q3mega.rollout.base import Completion, Sampler, SamplingParams
from q3mega.rollout.tools import Environment


def run_episodes(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    environments: Sequence[Environment | None],
    params: SamplingParams,
    max_turns: int = 3,
) -> list[tuple[Completion, list[str]]]:
    """For each prompt, one episode as a single completion, and its assistant turns as text."""
    done = [Completion([], [], [], "stop") for _ in prompts]
    turns: list[list[str]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for turn in range(max_turns):
        asked = [list(prompts[i]) + done[i].tokens for i in active]
        sampled = sampler.generate(asked, replace(params, n=1, seed=params.seed + turn))
        still = []
        for i, (new,) in zip(active, sampled, strict=True):
            _extend(done[i], new.tokens, new.logprobs, new.mask)
            done[i].finish_reason, done[i].weights = new.finish_reason, new.weights
            stopped = new.finish_reason == "stop"
            text = tokenizer.decode(new.tokens[:-1] if stopped else new.tokens)
            turns[i].append(text)
            environment = environments[i]
            answer = environment.step(text) if environment and stopped else None
            if answer and turn + 1 < max_turns:
                following = tokenizer.encode("\n" + render(answer, add_generation_prompt=True))
                _extend(done[i], following, [0.0] * len(following), [0] * len(following))
                still.append(i)
        active = still  # with none left the turns still count: other ranks may go on
    return list(zip(done, turns, strict=True))


def _extend(to: Completion, tokens: list[int], logprobs: list[float], mask: list[int]) -> None:
    to.tokens += tokens
    to.logprobs += logprobs
    to.mask += mask
