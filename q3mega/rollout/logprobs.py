"""Scoring sequences with a frozen model: the reference policy, the judge, the preference model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from q3mega import ops
from q3mega.data.batch import Batch, Sample, collate
from q3mega.engine import Engine, LMHead
from q3mega.model.routing import ROUTED_EXPERTS, as_column

CAPACITY = 8192  # tokens a forward pass
ROWS = 1024  # positions whose logits are in memory at once
_T = TypeVar("_T")


def each_sequence(
    engine: Engine, sequences: Sequence[list[int]], fn: Callable[[LMHead, Batch], list[_T]]
) -> list[_T]:
    """fn's results in the order of `sequences`; fn gives one result a document of its batch."""
    batches = _batches([Sample(s, [0.0] * len(s)) for s in sequences])
    return [r for part in engine.evaluate(batches, fn) for r in part]


def token_logprobs(
    engine: Engine, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0
) -> list[list[float]]:
    """Log-probability of each completion token, for (prompt, completion) pairs of ids."""
    scores = each_sequence(engine, [p + c for p, c in sequences], partial(_score, temperature))
    return [row[len(p) - 1 : -1] for row, (p, _) in zip(scores, sequences, strict=True)]


def routed_logprobs(
    engine: Engine,
    sequences: Sequence[tuple[list[int], list[int]]],
    temperature: float = 1.0,
    replayed: Sequence[Tensor] | None = None,
) -> list[tuple[list[float], Tensor]]:
    """`token_logprobs` of a mixture of experts, under `replayed` routes if given, and the routes
    that its routers choose by themselves; both as in `Completion`."""
    samples = [Sample(p + c, [0.0] * len(p + c)) for p, c in sequences]
    if replayed is not None:
        routes = map(as_column, replayed)
        samples = [
            replace(s, columns={ROUTED_EXPERTS: r}) for s, r in zip(samples, routes, strict=True)
        ]
    batches = _batches(samples)
    scores, chosen = engine.evaluate_routed(batches, partial(_score, temperature))
    routes_each = [r for b, c in zip(batches, chosen, strict=True) for r in c.split(_lengths(b))]
    return [
        (row[len(p) - 1 : -1], r[:-1].clone())
        for row, r, (p, _) in zip(chain.from_iterable(scores), routes_each, sequences, strict=True)
    ]


def _score(temperature: float, head: LMHead, batch: Batch) -> list[list[float]]:
    logprob, _ = ops.linear_logprob(
        head.hidden, head.weight, batch.targets, temperature=temperature,
        valid_vocab=head.valid_vocab, tp_group=head.tp_group,
    )  # fmt: skip
    return [part.tolist() for part in logprob.split(_lengths(batch))]


def _lengths(batch: Batch) -> list[int]:
    return batch.cu_seqlens.diff().tolist()


def top_logprobs(
    engine: Engine, batches: Sequence[Batch], k: int, temperature: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """(ids (T, K) int64, log-probabilities (T, K) fp32) of the K likeliest next tokens at every
    position of each batch."""

    def best(head: LMHead, batch: Batch) -> tuple[Tensor, Tensor]:
        per_batch = []
        for hidden in head.hidden.split(ROWS):
            logprobs = (replace(head, hidden=hidden).logits() / temperature).log_softmax(-1)
            per_batch.append(logprobs.topk(k))
        values, ids = (torch.cat(parts).cpu() for parts in zip(*per_batch, strict=True))
        return ids, values

    return engine.evaluate(batches, best)


def _batches(samples: Sequence[Sample]) -> list[Batch]:
    """Whole sequences in their order, as many as fit."""
    batches: list[list[Sample]] = []
    room = 0
    for sample in samples:
        if len(sample) > room:
            batches.append([])
            room = max(CAPACITY, len(sample))
        batches[-1].append(sample)
        room -= len(sample)
    return [collate(samples) for samples in batches]
