"""The second loop: roll out, score, credit, update. Both RL stages are this loop."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from q3mega.algorithms.credit import group_advantages
from q3mega.algorithms.entropy import EntropyController
from q3mega.algorithms.losses import normalise, policy_gradient
from q3mega.data.batch import Sample
from q3mega.engine import Engine, parallel
from q3mega.errors import UserError
from q3mega.rollout import Completion
from q3mega.train.log import Log, size
from q3mega.train.supervised import shard


@dataclass
class Rollout:
    """One completion of one prompt, with its reward. Group: which prompt of the batch."""

    prompt: list[int]
    completion: Completion
    group: int
    reward: float = 0.0
    task: str = ""
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)  # each reward's own score
    ref_logprobs: list[float] | None = None


@dataclass(frozen=True)
class PolicySettings:
    """How rollouts become updates; the published presets are in QWEN3_FACTS section 7."""

    updates: int  # optimizer steps a rollout batch: off-policy after the first
    capacity: int  # tokens a micro-batch
    aggregate: str = "token"
    constant: int = 1  # tokens, the divisor of aggregate "constant" (Dr. GRPO)
    scale_by_std: bool = True
    loss: dict[str, Any] | None = None  # settings of ops.grpo_loss
    max_gap: float | None = None  # mean |delta log p| between sampler and trainer


def credit(rollouts: Sequence[Rollout], settings: PolicySettings) -> list[Sample]:
    """Group-relative advantages on the sampled tokens; groups of equal rewards are dropped."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    samples = []
    for members in groups.values():
        advantages = group_advantages(
            [m.reward for m in members], scale_by_std=settings.scale_by_std
        )
        for member, advantage in zip(members, advantages or [], strict=bool(advantages)):
            samples.append(_sample(member, advantage))
    return samples


def _sample(rollout: Rollout, advantage: float) -> Sample:
    completion, before = rollout.completion, len(rollout.prompt)
    blank = [0.0] * before
    columns = {
        "advantages": blank + [advantage] * len(completion.tokens),
        "old_logprobs": blank + completion.logprobs,
    }
    if rollout.ref_logprobs is not None:
        columns["ref_logprobs"] = blank + rollout.ref_logprobs
    weights = blank + [float(m) for m in completion.mask]
    return Sample(rollout.prompt + completion.tokens, weights, columns)


def train(
    engine: Engine,
    roll_out: Callable[[int], list[Rollout]],
    settings: PolicySettings,
    entropy: EntropyController,
    *,
    steps: int,
    folder: Path,
    log: Log,
    save_every: int,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Steps 1..steps. `roll_out(step)` samples and scores this data-parallel rank's prompts.

    `watch` is told each step that is done, 0 before the first.
    """
    resumed = engine.load_latest(folder)
    first = resumed[0] if resumed else 0
    if resumed:
        entropy.coefficient, entropy.target = resumed[1]["coefficient"], resumed[1]["target"]
    log.resume(first)
    if watch and first == 0:
        watch(0)
    for step in range(first + 1, steps + 1):
        engine.finish_saving()  # a rollout is long beside it
        rollouts = parallel.gather_over_data(roll_out(step))
        samples = credit(rollouts, settings)
        totals: dict[str, float] = {}
        for update, part in enumerate(_split(samples, settings.updates)):
            loss = policy_gradient(**(settings.loss or {}), entropy_coef=entropy.coefficient)
            batches = shard(
                normalise(part, settings.aggregate, settings.constant), settings.capacity
            )
            metrics = engine.train_step(batches, loss)
            if update == 0:  # the policy that sampled: its entropy, and the sampler-trainer gap
                totals |= {k: metrics[k] / metrics["active"] for k in ("entropy", "gap")}
                _check_gap(totals["gap"], settings.max_gap, step)
            for name in ("loss", "grad_norm", "lr"):
                totals[name] = totals.get(name, 0.0) + metrics[name] / settings.updates
            for name in ("kl", "clipped"):
                mean = metrics[name] / max(metrics["active"], 1.0)
                totals[name] = totals.get(name, 0.0) + mean / settings.updates
        totals["entropy_coef"] = entropy.coefficient
        if samples:
            entropy.update(totals["entropy"])
        log.step(step, **_summary(rollouts, samples), **totals)
        shown = rollouts[step % len(rollouts)]
        log.sample(
            step,
            task=shown.task,
            reward=shown.reward,
            reason=shown.reason,
            tokens=shown.completion.tokens,
        )
        if watch:
            watch(step)
        if step % save_every == 0 or step == steps:
            state = {"coefficient": entropy.coefficient, "target": entropy.target}
            engine.save(folder, step, state)
    engine.finish_saving()


def _check_gap(gap: float, limit: float | None, step: int) -> None:
    if limit is not None and not gap <= limit:  # nan is no answer either
        raise UserError(
            f"engine.max_gap={limit}: at step {step} sampler and trainer are {gap:.3g} apart in "
            "mean |delta log p|; do the servers compute in the trainer's precision, and at "
            "temperature 1? `q3mega gap` compares them"
        )


def _split(samples: list[Sample], parts: int) -> list[list[Sample]]:
    """Mini-batches of nearly equal size; members of a group land in different ones."""
    return [samples[i::parts] for i in range(parts) if samples[i::parts]]


def _summary(rollouts: list[Rollout], samples: list[Sample]) -> dict[str, float]:
    lengths = [len(r.completion.tokens) for r in rollouts]
    by_task: dict[str, list[float]] = {}
    by_reward: dict[str, list[float]] = {}
    for r in rollouts:
        by_task.setdefault(r.task, []).append(r.reward)
        for name, value in r.parts.items():
            by_reward.setdefault(name, []).append(value)
    return {
        "reward": sum(r.reward for r in rollouts) / len(rollouts),
        "length": sum(lengths) / len(lengths),
        "truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / len(rollouts),
        "kept": len(samples) / len(rollouts),
        **size([_sample(r, 0.0) for r in rollouts]),
        **size(samples, "trained_"),
        **{f"reward/{task}": statistics.fmean(v) for task, v in sorted(by_task.items())},
        **{f"score/{name}": statistics.fmean(v) for name, v in sorted(by_reward.items())},
        **{f"spread/{name}": statistics.pstdev(v) for name, v in sorted(by_reward.items())},
    }
