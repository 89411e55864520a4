"""From scored rollouts to the samples of an update, in the order in which the loop does it.

A batch's samples are a dict from the rollout's index in the batch. `dropped` says of an index why
nothing is learnt from it.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from q3mega.algorithms.advantages import group_advantages
from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.data.batch import Sample
from q3mega.engine import Engine, parallel
from q3mega.errors import UserError
from q3mega.model.routing import ROUTED_EXPERTS, as_column, differing
from q3mega.ops.grpo_loss import Settings as GrpoSettings
from q3mega.rewards.overlong import overlong_penalty
from q3mega.rollout.logprobs import routed_logprobs, token_logprobs
from q3mega.train.rollouts import Rollout

_T = TypeVar("_T")


@dataclass(frozen=True)
class PolicySettings:
    """How rollouts become updates.

    updates: optimizer steps on a rollout batch; all but the first are off-policy.
    capacity: tokens of a micro-batch.
    max_tokens: of an answer; also the divisor of aggregate "constant" (Dr. GRPO).
    aggregate, scale_by_std: see `config.rl.VARIANTS`.
    loss: of `ops.grpo_loss`.
    overlong, rollout correction, routing_replay: see `config.rl.RLSettings`.
    temperature: of the sampler, whose distribution is the policy.
    max_logprob_mismatch: mean |delta log p| between sampler and trainer that ends the run.
    """

    updates: int
    capacity: int
    max_tokens: int
    aggregate: Literal["token", "sequence", "constant"] = "token"
    scale_by_std: bool = True
    loss: GrpoSettings = field(default_factory=GrpoSettings)
    overlong: Literal["none", "penalty", "mask"] = "none"
    correction: RolloutCorrection | None = None
    temperature: float = 1.0
    max_logprob_mismatch: float | None = None
    routing_replay: Literal["none", "r2", "r3"] = "none"


class Recomputed(NamedTuple):
    """What the trainer's weights say of one completion.

    logprobs: of its tokens.
    routed_experts: with R2 the experts that the trainer took.
    experts_differing: with R3 (how many of the sampler's experts the trainer would not take, of
    how many).
    """

    logprobs: list[float]
    routed_experts: Tensor | None = None
    experts_differing: tuple[int, int] = (0, 0)


def compute_advantages(
    rollouts: Sequence[Rollout], settings: PolicySettings
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Group-relative advantages on the sampled tokens: (kept, dropped), by index in the batch.

    What could not be judged is no part of its group. Groups of equal rewards teach nothing and are
    dropped. With overlong "mask" a truncated completion only counts in its group's mean.
    """
    groups: dict[int, list[int]] = {}
    kept: dict[int, Sample] = {}
    dropped: dict[int, str] = {}
    for index, rollout in enumerate(rollouts):
        if rollout.reward is None:
            dropped[index] = f"unjudged: {' '.join(rollout.reason.split()):.120}"
        else:
            groups.setdefault(rollout.group, []).append(index)
    for indices in groups.values():
        advantages = group_advantages(
            [_reward_less_length(rollouts[index], settings) for index in indices],
            scale_by_std=settings.scale_by_std,
        )
        if advantages is None:
            dropped |= dict.fromkeys(indices, "equal rewards")
            continue
        for index, advantage in zip(indices, advantages, strict=True):
            truncated = rollouts[index].completion.finish_reason == "length"
            if truncated and settings.overlong == "mask":
                dropped[index] = "over-long"
            else:
                kept[index] = sample_of(rollouts[index], advantage)
    return kept, dropped


def _reward_less_length(rollout: Rollout, settings: PolicySettings) -> float:
    """The reward of a judged rollout, less what its length costs."""
    assert rollout.reward is not None
    if settings.overlong != "penalty":
        return rollout.reward
    turns = (sum(run) for _, run in groupby(rollout.completion.mask))
    length, limit = max(turns), settings.max_tokens  # the limit is a turn's
    return rollout.reward + overlong_penalty(length, limit, limit // 5)


def sample_of(rollout: Rollout, advantage: float) -> Sample:
    """The rollout's tokens with one advantage on each that the model chose."""
    completion, before = rollout.completion, len(rollout.prompt)
    blank = [0.0] * before
    columns = {
        "advantages": blank + [advantage] * len(completion.tokens),
        "old_logprobs": blank + completion.logprobs,
    }
    weights = blank + [float(m) for m in completion.mask]
    return Sample(rollout.prompt + completion.tokens, weights, columns)


def drop_not_finite(samples: dict[int, Sample], dropped: dict[int, str]) -> None:
    """Drop the samples that have a number which is not finite on a token with loss weight."""
    for index, sample in list(samples.items()):
        for name in ("advantages", "old_logprobs", "ref_logprobs"):
            column = sample.columns.get(name, ())
            pairs = zip(column, sample.weights, strict=False)
            if not all(math.isfinite(value) for value, weight in pairs if weight):
                del samples[index]
                dropped[index] = f"{name} not finite"
                break


def add_reference_logprobs(
    reference: Engine,
    rollouts: list[Rollout],
    samples: dict[int, Sample],
    settings: PolicySettings,
) -> None:
    """Add the column `ref_logprobs`: log-probabilities under the reference policy."""

    def compute(local: list[Rollout]) -> list[list[float]]:
        return token_logprobs(reference, _pairs(local), settings.temperature)

    for index, logprobs in _for_samples(rollouts, samples, compute).items():
        _add_columns(samples, index, ref_logprobs=_after_prompt(rollouts[index], logprobs))


def apply_rollout_correction(
    engine: Engine,
    rollouts: list[Rollout],
    samples: dict[int, Sample],
    dropped: dict[int, str],
    settings: PolicySettings,
) -> dict[str, float]:
    """Make samples relative to the trainer's current weights, and weigh them for the sampler.

    `old_logprobs` become the trainer's, and advantages are multiplied by the importance weight of
    trainer against sampler. A completion whose weights are all 0 is dropped, but stays a sample: it
    counts in the mean. With routing replay the samples get their experts.

    Returns means over tokens: logprob_mismatch, importance_weight, and with R3
    routed_experts_mismatch, the share of expert choices that differ.
    """
    correction, replay = settings.correction, settings.routing_replay
    if replay == "r3":
        for index in samples:
            _attach_experts(samples, index, experts_of(rollouts[index]))
    if not samples or (correction is None and replay != "r2"):
        return {}
    recomputed = _for_samples(rollouts, samples, lambda local: _recompute(engine, local, settings))
    if replay == "r2":
        for index in samples:
            _attach_experts(samples, index, recomputed[index].routed_experts)
    if correction is None:
        return {}
    mismatches: list[float] = []
    weights: list[float] = []
    for index, sample in list(samples.items()):
        completion, before = rollouts[index].completion, len(rollouts[index].prompt)
        chosen = np.array(completion.mask, dtype=bool)
        logprobs = recomputed[index].logprobs
        trainer, sampler = np.array(logprobs), np.array(completion.logprobs)
        if not np.isfinite(trainer[chosen]).all():
            del samples[index]
            dropped[index] = "trainer's log-probability not finite"
            continue
        advantages = np.array(sample.columns["advantages"][before:])
        importance = correction.importance_weights(trainer[chosen], sampler[chosen], advantages[0])
        advantages[chosen] *= importance
        _add_columns(
            samples, index,
            advantages=_after_prompt(rollouts[index], advantages.tolist()),
            old_logprobs=_after_prompt(rollouts[index], logprobs),
        )  # fmt: skip
        if not importance.any():
            dropped[index] = "off-policy"
        mismatches += np.abs(trainer - sampler)[chosen].tolist()
        weights += importance.tolist()
    if not mismatches:
        return {}
    metrics = {
        "logprob_mismatch": statistics.fmean(mismatches),
        "importance_weight": statistics.fmean(weights),
    }
    if replay == "r3":
        counts = [row.experts_differing for row in recomputed.values()]
        differ, total = (sum(column) for column in zip(*counts, strict=True))
        metrics["routed_experts_mismatch"] = differ / max(total, 1)
    return metrics


def _recompute(
    engine: Engine, rollouts: list[Rollout], settings: PolicySettings
) -> list[Recomputed]:
    """Log-probabilities of each completion under the trainer's current weights."""
    pairs = _pairs(rollouts)
    if settings.routing_replay == "none":
        rows = token_logprobs(engine, pairs, settings.temperature)
        return [Recomputed(row) for row in rows]
    if settings.routing_replay == "r2":
        return [
            Recomputed(row, experts)
            for row, experts in routed_logprobs(engine, pairs, settings.temperature)
        ]
    sampled = [experts_of(r) for r in rollouts]
    routed = routed_logprobs(engine, pairs, settings.temperature, sampled)
    topk = engine.shape.topk
    return [
        Recomputed(row, experts_differing=differing(theirs, ours, topk))
        for (row, ours), theirs in zip(routed, sampled, strict=True)
    ]


def experts_of(rollout: Rollout) -> Tensor:
    """The experts that the sampler took; UserError where it gave none."""
    if rollout.completion.routes is None:
        raise UserError(
            "routing_replay=r3: the sampler gave no routes; ask for them with "
            "SamplingParams(routes=True)"
        )
    return rollout.completion.routes


def _for_samples(
    rollouts: list[Rollout],
    samples: dict[int, Sample],
    compute: Callable[[list[Rollout]], list[_T]],
) -> dict[int, _T]:
    """compute's result for the rollout of each sample, shared out over data-parallel ranks."""
    indices = list(samples)
    results = parallel.map_over_data_ranks(
        indices, lambda local: compute([rollouts[index] for index in local])
    )
    return dict(zip(indices, results, strict=True))


def _pairs(rollouts: list[Rollout]) -> list[tuple[list[int], list[int]]]:
    return [(r.prompt, r.completion.tokens) for r in rollouts]


def _after_prompt(rollout: Rollout, values: list[float]) -> list[float]:
    return [0.0] * len(rollout.prompt) + values


def _attach_experts(samples: dict[int, Sample], index: int, experts: Tensor | None) -> None:
    assert experts is not None  # of a mixture, as the recipe has checked
    _add_columns(samples, index, **{ROUTED_EXPERTS: as_column(experts)})


def _add_columns(samples: dict[int, Sample], index: int, **columns: list[float] | Tensor) -> None:
    sample = samples[index]
    samples[index] = replace(sample, columns={**sample.columns, **columns})
