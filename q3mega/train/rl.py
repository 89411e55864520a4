"""The second loop: roll out, score, credit, update. Both RL stages are this loop."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from q3mega.algorithms.advantages import group_advantages
from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.losses import normalise, policy_gradient
from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.data.batch import Sample
from q3mega.engine import Engine, parallel
from q3mega.errors import UserError
from q3mega.model.routing import ROUTED_EXPERTS, as_column, differing
from q3mega.problems import Problem
from q3mega.rewards.overlong import overlong_penalty
from q3mega.rollout.logprobs import routed_logprobs, token_logprobs
from q3mega.train import stopping
from q3mega.train.ledger import FILE as LEDGER
from q3mega.train.ledger import Ledger
from q3mega.train.log import Log, size
from q3mega.train.rollouts import Batches, Rollout, pack, unpack
from q3mega.train.schedule import Schedule
from q3mega.train.supervised import shard

_T = TypeVar("_T")


@dataclass(frozen=True)
class PolicySettings:
    """How rollouts become updates."""

    updates: int  # optimizer steps a rollout batch: off-policy after the first
    capacity: int  # tokens a micro-batch
    max_tokens: int  # of a completion, and the divisor of aggregate "constant" (Dr. GRPO)
    aggregate: str = "token"
    scale_by_std: bool = True
    loss: dict[str, Any] | None = None  # settings of ops.grpo_loss
    overlong: Literal["none", "penalty", "mask"] = "none"
    correction: RolloutCorrection | None = None
    temperature: float = 1.0  # of the sampler, whose distribution is the policy
    max_logprob_mismatch: float | None = None  # mean |delta log p| between sampler and trainer
    # the experts that updates use: the routers', the trainer's before the updates, the sampler's
    routing_replay: Literal["none", "r2", "r3"] = "none"


def compute_advantages(
    rollouts: Sequence[Rollout], settings: PolicySettings
) -> tuple[dict[int, Sample], dict[int, str]]:
    """Group-relative advantages on the sampled tokens: (kept, dropped), by place in the batch.

    dropped says why: what could not be judged is no part of its group; groups of equal rewards
    teach nothing; with overlong "mask" a truncated completion only counts in its group's mean.
    """
    groups: dict[int, list[int]] = {}
    kept: dict[int, Sample] = {}
    dropped: dict[int, str] = {}
    for place, rollout in enumerate(rollouts):
        if rollout.reward is None:
            dropped[place] = f"unjudged: {' '.join(rollout.reason.split()):.120}"
        else:
            groups.setdefault(rollout.group, []).append(place)
    for places in groups.values():
        advantages = group_advantages(
            [_punished(rollouts[place], settings) for place in places],
            scale_by_std=settings.scale_by_std,
        )
        if advantages is None:
            dropped |= dict.fromkeys(places, "equal rewards")
            continue
        for place, advantage in zip(places, advantages, strict=True):
            cut = rollouts[place].completion.finish_reason == "length"
            if cut and settings.overlong == "mask":
                dropped[place] = "over-long"
            else:
                kept[place] = _sample(rollouts[place], advantage)
    return kept, dropped


def _punished(rollout: Rollout, settings: PolicySettings) -> float:
    """The reward of a judged rollout, less what its length costs."""
    assert rollout.reward is not None
    if settings.overlong != "penalty":
        return rollout.reward
    turns = (sum(run) for _, run in groupby(rollout.completion.mask))
    length, limit = max(turns), settings.max_tokens  # the limit is a turn's
    return rollout.reward + overlong_penalty(length, limit, limit // 5)


def _sample(rollout: Rollout, advantage: float) -> Sample:
    completion, before = rollout.completion, len(rollout.prompt)
    blank = [0.0] * before
    columns = {
        "advantages": blank + [advantage] * len(completion.tokens),
        "old_logprobs": blank + completion.logprobs,
    }
    weights = blank + [float(m) for m in completion.mask]
    return Sample(rollout.prompt + completion.tokens, weights, columns)


def train(
    engine: Engine,
    schedule: Schedule,
    settings: PolicySettings,
    entropy: EntropyController,
    *,
    prompts: Callable[[int], Sequence[Problem]],
    steps: int,
    folder: Path,
    log: Log,
    save_every: int,
    reference: Engine | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Steps 1..steps, each of which learns from the batch that `schedule` has sampled for it.

    prompts: the problems of a step's batch. reference: the policy of the KL. `watch` is told each
    step that is done, 0 before the first.
    """
    first, state = engine.load_latest(folder) or (0, {})
    updates = state.get("updates", 0)
    if state:
        entropy.coefficient, entropy.target = state["coefficient"], state["target"]
    ready = unpack(state["ahead"], state["tensors"]) if "tensors" in state else {}
    ledger = Ledger(log.folder / LEDGER, writes=log.writes)
    ledger.resume(first, ready)
    log.resume(first)
    if watch and first == 0:
        watch(0)

    def keep(batches: Batches) -> None:
        for number, batch in batches.items():
            ledger.drawn(number, batch)
        ready.update(batches)

    def begin(number: int) -> None:
        ledger.begun(number, prompts(number))

    def save(step: int) -> None:
        keep(schedule.drain())
        _save(engine, folder, step, entropy, updates, ready)

    for step in stopping.steps(first + 1, steps, save_every, save, engine.finish_saving):
        engine.finish_saving()  # sampling is long beside it
        keep(schedule.collect_batches(step, steps, updates, ready, begin))
        rollouts = ready.pop(step)
        oldest = statistics.fmean(min(r.versions) for r in rollouts)
        samples, dropped = compute_advantages(rollouts, settings)
        _leave_out_unknown(samples, dropped)
        corrected = _apply_rollout_correction(engine, rollouts, samples, dropped, settings)
        if reference:
            _add_reference_logprobs(reference, rollouts, samples, settings)
            _leave_out_unknown(samples, dropped)
        ledger.dropped(step, dropped)
        totals = {"staleness": updates - oldest, **corrected}
        _check_gap(totals, settings.max_logprob_mismatch, step)
        for places in _split(list(samples), settings.updates):
            metrics = _update(engine, [samples[p] for p in places], settings, entropy)
            learnt = [p for p in places if p not in dropped]
            if "skipped" in metrics:
                ledger.dropped(step, dict.fromkeys(learnt, "skipped update"))
            else:
                updates += 1
                ledger.used(step, updates, learnt)
            _add(totals, metrics, settings.updates)
            _check_gap(totals, settings.max_logprob_mismatch, step)
        totals["entropy_coef"] = entropy.coefficient
        if "entropy" in totals:  # else nothing was learnt from
            entropy.update(totals["entropy"])
        _record(log, step, rollouts, list(samples.values()), totals)
        if watch:
            watch(step)
    engine.finish_saving()


def _leave_out_unknown(samples: dict[int, Sample], dropped: dict[int, str]) -> None:
    """Drop those with a number on a token to learn from that is none: so would their loss be."""
    for place, sample in list(samples.items()):
        for name in ("advantages", "old_logprobs", "ref_logprobs"):
            column = sample.columns.get(name, ())
            pairs = zip(column, sample.weights, strict=False)
            if not all(math.isfinite(value) for value, weight in pairs if weight):
                del samples[place]
                dropped[place] = f"{name} not finite"
                break


def _shared(
    rollouts: list[Rollout], places: Iterable[int], work: Callable[[list[Rollout]], list[_T]]
) -> dict[int, _T]:
    """work's result for each rollout at `places`: every data-parallel rank does a share of it."""
    mine = list(places)[parallel.data_rank() :: parallel.data_size()]
    found = work([rollouts[p] for p in mine])
    return dict(parallel.gather_over_data(list(zip(mine, found, strict=True))))


def _add_reference_logprobs(
    reference: Engine,
    rollouts: list[Rollout],
    samples: dict[int, Sample],
    settings: PolicySettings,
) -> None:
    def work(mine: list[Rollout]) -> list[list[float]]:
        return token_logprobs(reference, _pairs(mine), settings.temperature)

    for place, found in _shared(rollouts, samples, work).items():
        _add_columns(samples, place, ref_logprobs=[0.0] * len(rollouts[place].prompt) + found)


def _apply_rollout_correction(
    engine: Engine,
    rollouts: list[Rollout],
    samples: dict[int, Sample],
    dropped: dict[int, str],
    settings: PolicySettings,
) -> dict[str, float]:
    """Ratios become relative to the trainer as it is now, advantages weighted for the sampler.

    A completion without a trusted token is dropped, but stays a sample: it counts in the mean.
    Returns the mean |difference of log-probabilities| and the mean trust a token. With routing
    replay samples get their routes; with R3 also returns the share of the sampler's that the
    trainer would not take.
    """
    replay = settings.routing_replay
    for place in samples if replay == "r3" else ():
        _add_columns(samples, place, **{ROUTED_EXPERTS: as_column(_routes_of(rollouts[place]))})
    if not samples or (settings.correction is None and replay != "r2"):
        return {}
    traced = _shared(rollouts, samples, lambda mine: _recompute_logprobs(engine, mine, settings))
    for place in samples if replay == "r2" else ():
        _add_columns(samples, place, **{ROUTED_EXPERTS: as_column(traced[place][1])})
    if settings.correction is None:
        return {}
    gaps, trusts = [], []
    for place, sample in list(samples.items()):
        completion, before = rollouts[place].completion, len(rollouts[place].prompt)
        chosen = np.array(completion.mask, dtype=bool)
        own, _ = traced[place]
        trainer, sampler = np.array(own), np.array(completion.logprobs)
        if not np.isfinite(trainer[chosen]).all():
            del samples[place]
            dropped[place] = "trainer's log-probability not finite"
            continue
        advantages = np.array(sample.columns["advantages"][before:])
        trust = settings.correction.importance_weights(
            trainer[chosen], sampler[chosen], advantages[0]
        )
        advantages[chosen] *= trust
        blank = [0.0] * before
        _add_columns(
            samples, place, advantages=blank + advantages.tolist(), old_logprobs=blank + own
        )
        if not trust.any():
            dropped[place] = "off-policy"
        gaps += np.abs(trainer - sampler)[chosen].tolist()
        trusts += trust.tolist()
    if not gaps:
        return {}
    metrics = {
        "logprob_mismatch": statistics.fmean(gaps),
        "importance_weight": statistics.fmean(trusts),
    }
    if replay == "r3":
        differ, of = (sum(n) for n in zip(*(counts for _, counts in traced.values()), strict=True))
        metrics["routed_experts_mismatch"] = differ / max(of, 1)
    return metrics


def _recompute_logprobs(
    engine: Engine, rollouts: list[Rollout], settings: PolicySettings
) -> list[tuple[list[float], Any]]:
    """Each completion's log-probabilities, and with R2 its routes, with R3 how many of them differ
    from the sampler's, of how many."""
    pairs = _pairs(rollouts)
    if settings.routing_replay == "none":
        return [(row, None) for row in token_logprobs(engine, pairs, settings.temperature)]
    if settings.routing_replay == "r2":
        return list(routed_logprobs(engine, pairs, settings.temperature))
    taken = [_routes_of(r) for r in rollouts]
    found = routed_logprobs(engine, pairs, settings.temperature, taken)
    topk = engine.shape.topk
    return [(row, differing(t, o, topk)) for (row, o), t in zip(found, taken, strict=True)]


def _pairs(rollouts: list[Rollout]) -> list[tuple[list[int], list[int]]]:
    return [(r.prompt, r.completion.tokens) for r in rollouts]


def _add_columns(samples: dict[int, Sample], place: int, **columns: list[float] | Tensor) -> None:
    sample = samples[place]
    samples[place] = replace(sample, columns={**sample.columns, **columns})


def _routes_of(rollout: Rollout) -> Tensor:
    if rollout.completion.routes is None:
        raise UserError(
            "routing_replay=r3: the sampler gave no routes; ask for them with "
            "SamplingParams(routes=True)"
        )
    return rollout.completion.routes


def _save(
    engine: Engine,
    folder: Path,
    step: int,
    entropy: EntropyController,
    updates: int,
    ready: Batches,
) -> None:
    state: dict[str, Any] = {"coefficient": entropy.coefficient, "target": entropy.target}
    state["updates"] = updates
    state["ahead"], tensors = pack(ready)
    engine.save(folder, step, state, tensors if ready else None)


def _update(
    engine: Engine, samples: list[Sample], settings: PolicySettings, entropy: EntropyController
) -> dict[str, float]:
    loss = policy_gradient(
        **(settings.loss or {}),
        entropy_coef=entropy.coefficient,
        temperature=settings.temperature,
    )
    weighted = normalise(samples, settings.aggregate, settings.max_tokens)
    return engine.train_step(shard(weighted, settings.capacity), loss)


def _add(totals: dict[str, float], metrics: dict[str, float], updates: int) -> None:
    """One update's metrics to the means over a batch's updates; skipped ones are counted."""
    if "skipped" in metrics:
        totals["skipped"] = totals.get("skipped", 0.0) + 1
        return
    if "entropy" not in totals:  # the policy that sampled: its entropy, and the sampler-trainer gap
        first = {k: metrics[k] / metrics["active"] for k in ("entropy", "logprob_mismatch")}
        totals |= first | totals  # a correction has measured the gap already
    for name in ("loss", "grad_norm", "lr", "balance", "expert_load"):
        if name in metrics:  # the last two are a mixture's
            totals[name] = totals.get(name, 0.0) + metrics[name] / updates
    for name in ("kl", "clip_fraction"):
        mean = metrics[name] / max(metrics["active"], 1.0)
        totals[name] = totals.get(name, 0.0) + mean / updates


def _record(
    log: Log,
    step: int,
    rollouts: list[Rollout],
    samples: list[Sample],
    totals: dict[str, float],
) -> None:
    summary = _summary(rollouts, samples)
    log.step(step, **summary, **totals)
    if summary["unscored_fraction"] == 1 and log.writes:
        print(
            f"step {step}: none of the rollouts could be judged: {rollouts[0].reason}", flush=True
        )
    shown = rollouts[step % len(rollouts)]
    log.sample(
        step,
        task=shown.task,
        reward=shown.reward,
        reason=shown.reason,
        text=shown.text,
    )


def _check_gap(totals: dict[str, float], limit: float | None, step: int) -> None:
    gap = totals.get(
        "logprob_mismatch", 0.0
    )  # unknown before the first update, without a correction
    if limit is not None and not gap <= limit:  # nan is no answer either
        raise UserError(
            f"rollout_servers.max_logprob_mismatch={limit}: at step {step} sampler and "
            f"trainer are {gap:.3g} apart in "
            "mean |delta log p|; do the servers compute in the trainer's precision, and at "
            "temperature 1? `q3mega logprob-mismatch` compares them"
        )


def _split(places: list[int], parts: int) -> list[list[int]]:
    """Mini-batches of nearly equal size; members of a group land in different ones."""
    return [places[i::parts] for i in range(parts) if places[i::parts]]


def _summary(rollouts: list[Rollout], samples: list[Sample]) -> dict[str, float]:
    lengths = [len(r.completion.tokens) for r in rollouts]
    by_task: dict[str, list[float]] = {}
    by_reward: dict[str, list[float]] = {}
    for r in rollouts:
        if r.reward is not None:
            by_task.setdefault(r.task, []).append(r.reward)
        for name, value in r.parts.items():
            by_reward.setdefault(name, []).append(value)
    rewards = [reward for values in by_task.values() for reward in values]
    return {
        **({"reward": statistics.fmean(rewards)} if rewards else {}),
        "unscored_fraction": 1 - len(rewards) / len(rollouts),
        "response_length": sum(lengths) / len(lengths),
        "truncated_fraction": sum(r.completion.finish_reason == "length" for r in rollouts)
        / len(rollouts),
        "kept_fraction": len(samples) / len(rollouts),
        **size([_sample(r, 0.0) for r in rollouts]),
        **size(samples, "trained_"),
        **{f"reward/{task}": statistics.fmean(v) for task, v in sorted(by_task.items())},
        **{f"reward_part/{name}": statistics.fmean(v) for name, v in sorted(by_reward.items())},
        **{f"reward_std/{name}": statistics.pstdev(v) for name, v in sorted(by_reward.items())},
    }
