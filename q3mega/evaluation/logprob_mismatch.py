"""The gap between trainer and sampler, or two layouts: what each thinks of the same tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from q3mega.data.batch import Batch
from q3mega.engine import Engine, LMHead
from q3mega.errors import UserError
from q3mega.model.routing import differing
from q3mega.rollout.base import Completion, Sampler, SamplingParams
from q3mega.rollout.logprobs import each_sequence, routed_logprobs, token_logprobs

_T = TypeVar("_T")


@dataclass(frozen=True)
class Gap:
    """mean, max: |delta log p| of a sampled token. kl: of the trainer from the sampler, nats a
    token. flipped: share of tokens that the sampler ranks first and the trainer does not. routes:
    share of the sampler's experts that the trainer does not choose; None: not asked for. Between
    layouts the tokens are given ones, and the recorded layout stands in the sampler's place.
    """

    tokens: int
    mean: float
    max: float
    kl: float
    flipped: float
    routes: float | None = None


def measure(
    engine: Engine, sampler: Sampler, prompts: Sequence[list[int]], params: SamplingParams
) -> Gap:
    """Compare on what the sampler writes, at temperature 1 and, for `flipped`, greedily; with
    params.routes a mixture's experts, too."""
    even = replace(params, temperature=1.0, top_p=1.0, top_k=0)
    completions = _pairs(prompts, sampler.generate(prompts, even))
    pairs = [(p, c.tokens) for p, c in completions]
    routes = None
    if params.routes:
        trainer, own_experts = map(list, zip(*routed_logprobs(engine, pairs), strict=True))
        routes = _differing([c.routes for _, c in completions], own_experts, engine.shape.topk)
    else:
        trainer = token_logprobs(engine, pairs)
    deltas = [
        a - b
        for own_experts, (_, c) in zip(trainer, completions, strict=True)
        for a, b, chosen in zip(own_experts, c.logprobs, c.mask, strict=True)
        if chosen
    ]
    greedy = _pairs(
        prompts, sampler.generate(prompts, replace(even, temperature=0.0, n=1, routes=False))
    )
    best = each_sequence(engine, [p + c.tokens for p, c in greedy], _best)
    flips = [
        a != b
        for own_experts, (p, c) in zip(best, greedy, strict=True)
        for a, b, chosen in zip(own_experts[len(p) - 1 : -1], c.tokens, c.mask, strict=True)
        if chosen
    ]
    return _gap(deltas, flips, routes)


class Record(BaseModel):
    """What a layout thinks of documents: of each token but a document's first its log-probability
    and the likeliest token in its place; routes: of each token that was fed, with experts.
    """

    documents: list[list[int]] = Field(min_length=1)
    logprobs: list[list[float]]
    best: list[list[int]]
    routes: list[list[list[int]]] | None = None


def record(engine: Engine, documents: Sequence[list[int]]) -> Record:
    """Every rank calls, and gets it; a mixture's has its routes."""
    pairs = [(d[:1], d[1:]) for d in documents]
    routes = None
    if engine.routing:
        logprobs, experts = map(list, zip(*routed_logprobs(engine, pairs), strict=True))
        routes = [each.tolist() for each in experts]
    else:
        logprobs = token_logprobs(engine, pairs)
    best = [row[:-1] for row in each_sequence(engine, documents, _best)]
    return Record(documents=list(documents), logprobs=logprobs, best=best, routes=routes)


def between(one: Record, other: Record, topk: int) -> Gap:
    """Of `one` from `other`, on the same documents. Raises UserError for others."""
    if one.documents != other.documents or (one.routes is None) != (other.routes is None):
        raise UserError(
            "the two records are of other tokens: both need the same checkpoint and --problems"
        )

    def along(x: Sequence[list[_T]], y: Sequence[list[_T]]) -> Iterator[tuple[_T, _T]]:
        yield from zip(chain.from_iterable(x), chain.from_iterable(y), strict=True)

    deltas = [a - b for a, b in along(one.logprobs, other.logprobs)]
    flips = [a != b for a, b in along(one.best, other.best)]
    routes = None
    if one.routes is not None and other.routes is not None:
        theirs, ours = ([torch.tensor(d) for d in r] for r in (other.routes, one.routes))
        routes = _differing(theirs, ours, topk)
    return _gap(deltas, flips, routes)


def _gap(deltas: Sequence[float], flips: Sequence[bool], routes: float | None) -> Gap:
    return Gap(
        tokens=len(deltas),
        mean=sum(map(abs, deltas)) / len(deltas),
        max=max(map(abs, deltas)),
        kl=sum(math.expm1(d) - d for d in deltas) / len(deltas),
        flipped=sum(flips) / len(flips),
        routes=routes,
    )


def _differing(sampled: Sequence[Tensor | None], ours: Sequence[Tensor], topk: int) -> float:
    pairs = zip(sampled, ours, strict=True)
    counts = [differing(theirs, routes, topk) for theirs, routes in pairs if theirs is not None]
    differ, of = (sum(each) for each in zip(*counts, strict=True))
    return differ / of


def _pairs(
    prompts: Sequence[list[int]], completions: Sequence[Sequence[Completion]]
) -> list[tuple[list[int], Completion]]:
    return [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]


def _best(head: LMHead, batch: Batch) -> list[list[int]]:
    """The likeliest next token at every place of each document."""
    step = 1024  # rows of logits at once
    rows = [replace(head, hidden=part).logits().argmax(-1) for part in head.hidden.split(step)]
    return [d.tolist() for d in torch.cat(rows).split(batch.cu_seqlens.diff().tolist())]
