"""What a sampler is: token ids in, token ids and their log-probabilities out, never text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Literal, Protocol

from torch import Tensor

from q3mega.data.tokenizer import Tokenizer
from q3mega.errors import UserError

# Qwen3 report section 4.3, in the form of the released client (no stray period after the tag)
STOP_THINKING = (
    "\n\nConsidering the limited time by the user, I have to give the solution "
    "based on the thinking directly now.\n</think>\n\n"
)


# How the report samples in its evaluations (section 4.6), presence penalty aside.
EVALUATION = {
    "think": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "no_think": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}


@dataclass(frozen=True)
class SamplingParams:
    """max_tokens: sampled tokens a completion. thinking_budget: tokens after which an open think
    block is closed with the text `stop_thinking` (None: never). n: completions a prompt. top_k = 0:
    off. routes: completions tell the experts that their tokens took.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    thinking_budget: int | None = None
    stop_thinking: str = STOP_THINKING
    n: int = 1
    seed: int = 0
    routes: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.n < 1:
            raise UserError(f"max_tokens={self.max_tokens} and n={self.n} must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(
                f"temperature={self.temperature} must be >= 0, top_p={self.top_p} in (0, 1], "
                f"top_k={self.top_k} >= 0"
            )
        if "</think>" not in self.stop_thinking:
            raise UserError(f"stop_thinking={self.stop_thinking!r} must close the block: </think>")


@dataclass
class Completion:
    """tokens include the stop token. logprobs: of each token at the sampling temperature, before
    top-p and top-k. mask: 0 marks tokens that the model did not choose (the stop text, tool
    results); they stay out of every loss.

    finish_reason "abort": it was interrupted, and can be continued. weight_versions: the versions
    that a server sampled with, in order, each with its number of tokens that the model chose.
    routes: (prompt + tokens - 1, layers * topk) of every token that was fed, as in
    q3mega.model.routing; the last one was not.
    """

    tokens: list[int]
    logprobs: list[float]
    mask: list[int]
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: list[tuple[str, int]] = field(default_factory=list)
    routes: Tensor | None = field(default=None, compare=False)


class Sampler(Protocol):
    """What samples completions: the training processes, or rollout servers."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """`params.n` completions for each prompt."""
        ...


def cut_at_unknown(completion: Completion, ids: int) -> Completion:
    """Without what follows from the first token on that a tokenizer of so many ids does not have: a
    server samples from all rows of its lm_head."""
    end = next((i for i, token in enumerate(completion.tokens) if token >= ids), None)
    if end is None:
        return completion
    left, weights = sum(completion.mask[:end]), []
    for version, chosen in completion.weight_versions:
        weights.append((version, min(chosen, left)))
        left -= weights[-1][1]
    routes = completion.routes
    if routes is not None:
        routes = routes[: len(routes) - (len(completion.tokens) - end)]
    return Completion(
        completion.tokens[:end], completion.logprobs[:end], completion.mask[:end], "length",
        [run for i, run in enumerate(weights) if run[1] or not i], routes,
    )  # fmt: skip


def merge_versions(versions: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """`Completion.weight_versions` with neighbouring entries of one version added up."""
    groups = groupby(versions, key=itemgetter(0))
    return [(version, sum(n for _, n in runs)) for version, runs in groups]


def text_of(completion: Completion, tokenizer: Tokenizer) -> str:
    """A completion's text without its stop token."""
    tokens = completion.tokens
    return tokenizer.decode(tokens[:-1] if completion.finish_reason == "stop" else tokens)
