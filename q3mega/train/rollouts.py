"""A rollout: one completion of one prompt with its reward; batches of them as plain tensors."""

from collections.abc import Mapping
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
    reward: None for what could not be judged, and `reason` says why.

    text: the assistant's turns, for people. versions: the weights that sampled it, each as the
    number of optimizer updates before it.
    """

    prompt: list[int]
    completion: Completion
    group: int
    reward: float | None = 0.0
    task: str = ""
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    text: str = ""
    versions: list[int] = field(default_factory=list)


Batches = dict[int, list[Rollout]]  # by the step that learns from them

_COLUMNS = {
    "prompt": torch.int32,
    "tokens": torch.int32,
    "mask": torch.uint8,
    "logprobs": torch.float64,  # a server's are not fp32
}
_PLAIN = ("group", "reward", "task", "reason", "problem", "text", "versions")


def pack(batches: Batches) -> tuple[Rows, dict[str, Tensor]]:
    """(JSON rows, tensors) that `unpack` makes the same batches of; a row has its lengths."""
    rows: Rows = []
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for step, r in ((step, r) for step, batch in batches.items() for r in batch):
        completion = r.completion
        parts: dict[str, list[Any]] = {
            "prompt": r.prompt, "tokens": completion.tokens, "mask": completion.mask,
            "logprobs": completion.logprobs,
        }  # fmt: skip
        for name, values in parts.items():
            columns[name] += values
        rows.append(
            {name: getattr(r, name) for name in _PLAIN}
            | {"step": step, "parts": dict(r.parts), "weights": completion.weight_versions}
            | {"finish_reason": completion.finish_reason}
            | {"lengths": {name: len(values) for name, values in parts.items()}}
            | {"routes": None if completion.routes is None else len(completion.routes)}
        )
    tensors = {n: torch.tensor(columns[n], dtype=kind) for n, kind in _COLUMNS.items()}
    found = (r.completion.routes for batch in batches.values() for r in batch)
    routes = [each for each in found if each is not None]
    return rows, tensors | ({"routes": torch.cat(routes)} if routes else {})


def unpack(rows: Rows, tensors: Mapping[str, Tensor]) -> Batches:
    """The batches that `pack` took apart."""
    cut = {}
    for name in _COLUMNS:
        values = tensors[name].tolist()
        ends = accumulate((row["lengths"][name] for row in rows), initial=0)
        cut[name] = [values[a:b] for a, b in pairwise(ends)]
    routed = [row["routes"] for row in rows if row["routes"] is not None]
    routes = iter(tensors["routes"].split(routed) if routed else ())
    batches: Batches = {}
    for i, row in enumerate(rows):
        completion = Completion(
            cut["tokens"][i],
            cut["logprobs"][i],
            cut["mask"][i],
            row["finish_reason"],
            [(version, n) for version, n in row["weights"]],
            None if row["routes"] is None else next(routes).clone(),
        )
        plain = {name: row[name] for name in _PLAIN}
        rollout = Rollout(cut["prompt"][i], completion, parts=row["parts"], **plain)
        batches.setdefault(row["step"], []).append(rollout)
    return batches
