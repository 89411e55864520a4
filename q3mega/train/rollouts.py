"""A rollout: one completion of one prompt with its reward, and a batch of them as plain tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from q3mega.rollout import Completion

Rows = list[dict[str, Any]]


@dataclass
class Rollout:
    """group: which prompt of the batch. problem: the Problem's id. parts: each reward's own score.

    text: the assistant's turns, for people. versions: the weights that sampled it, each as the
    number of optimizer updates before it.
    """

    prompt: list[int]
    completion: Completion
    group: int
    reward: float = 0.0
    task: str = ""
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    ref_logprobs: list[float] | None = None
    problem: str = ""
    text: str = ""
    versions: list[int] = field(default_factory=list)


_COLUMNS = {
    "prompt": torch.int32,
    "tokens": torch.int32,
    "mask": torch.uint8,
    "logprobs": torch.float64,  # a server's are not fp32
    "ref_logprobs": torch.float64,
}
_PLAIN = ("group", "reward", "task", "reason", "problem", "text", "versions")


def pack(rollouts: Sequence[Rollout]) -> tuple[Rows, dict[str, Tensor]]:
    """(JSON rows, tensors) that `unpack` makes the same rollouts of; a row has its lengths."""
    rows: Rows = []
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for r in rollouts:
        parts: dict[str, list[Any]] = {
            "prompt": r.prompt, "tokens": r.completion.tokens, "mask": r.completion.mask,
            "logprobs": r.completion.logprobs, "ref_logprobs": r.ref_logprobs or [],
        }  # fmt: skip
        for name, values in parts.items():
            columns[name] += values
        rows.append(
            {name: getattr(r, name) for name in _PLAIN}
            | {"parts": dict(r.parts), "finish_reason": r.completion.finish_reason}
            | {"weights": r.completion.weights, "spans": r.completion.versions}
            | {"lengths": {name: len(values) for name, values in parts.items()}}
        )
    return rows, {n: torch.tensor(columns[n], dtype=kind) for n, kind in _COLUMNS.items()}


def unpack(rows: Rows, tensors: Mapping[str, Tensor]) -> list[Rollout]:
    """The rollouts that `pack` took apart."""
    cut = {}
    for name in _COLUMNS:
        values = tensors[name].tolist()
        ends = accumulate((row["lengths"][name] for row in rows), initial=0)
        cut[name] = [values[a:b] for a, b in pairwise(ends)]
    return [
        Rollout(
            cut["prompt"][i],
            Completion(
                cut["tokens"][i],
                cut["logprobs"][i],
                cut["mask"][i],
                row["finish_reason"],
                row["weights"],
                [(end, version) for end, version in row["spans"]],
            ),
            ref_logprobs=cut["ref_logprobs"][i] or None,
            parts=row["parts"],
            **{name: row[name] for name in _PLAIN},
        )
        for i, row in enumerate(rows)
    ]
