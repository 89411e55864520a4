"""Scoring sequences with a frozen model: the reference policy, the judge, the preference model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from q3mega import ops
from q3mega.data.batch import Batch, Sample, collate
from q3mega.engine import Engine, Head

CAPACITY = 8192  # tokens a forward pass
ROWS = 1024  # positions whose logits are in memory at once
_T = TypeVar("_T")


def each_sequence(
    engine: Engine, sequences: Sequence[list[int]], fn: Callable[[Head, Batch], list[_T]]
) -> list[_T]:
    """fn's results in the order of `sequences`; fn gives one result a document of its batch."""
    return [r for part in engine.evaluate(_batches(sequences), fn) for r in part]


def token_logprobs(
    engine: Engine, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0
) -> list[list[float]]:
    """Log-probability of each completion token, for (prompt, completion) pairs of ids."""

    def score(head: Head, batch: Batch) -> list[list[float]]:
        logprob, _ = ops.linear_logprob(
            head.hidden, head.weight, batch.targets,
            temperature=temperature, tp_group=head.tp_group,
        )  # fmt: skip
        return [part.tolist() for part in logprob.split(batch.cu_seqlens.diff().tolist())]

    whole = each_sequence(engine, [p + c for p, c in sequences], score)
    return [row[len(p) - 1 : -1] for row, (p, _) in zip(whole, sequences, strict=True)]


def top_logprobs(
    engine: Engine, batches: Sequence[Batch], k: int, temperature: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """(ids (T, K) int64, log-probabilities (T, K) fp32) of the K likeliest next tokens at every
    position of each batch."""

    def best(head: Head, batch: Batch) -> tuple[Tensor, Tensor]:
        found = []
        for hidden in head.hidden.split(ROWS):
            logprobs = (replace(head, hidden=hidden).logits() / temperature).log_softmax(-1)
            found.append(logprobs.topk(k))
        values, ids = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return ids, values

    return engine.evaluate(batches, best)


def _batches(sequences: Sequence[list[int]]) -> list[Batch]:
    """Whole sequences in their order, as many as fit."""
    batches: list[list[Sample]] = []
    room = 0
    for tokens in sequences:
        if len(tokens) > room:
            batches.append([])
            room = max(CAPACITY, len(tokens))
        batches[-1].append(Sample(tokens, [0.0] * len(tokens)))
        room -= len(tokens)
    return [collate(samples) for samples in batches]
