"""What the RL loop records of a rollout batch and of its updates."""

import statistics

from q3mega.data.batch import Sample
from q3mega.errors import UserError
from q3mega.train.log import Log, size
from q3mega.train.rollouts import Rollout
from q3mega.train.samples import sample_of


def add_update(totals: dict[str, float], metrics: dict[str, float], updates: int) -> None:
    """One update's metrics to the means over a batch's updates; skipped ones are counted."""
    if "skipped" in metrics:
        totals["skipped"] = totals.get("skipped", 0.0) + 1
        return
    if "entropy" not in totals:  # of the policy that sampled
        first = {k: metrics[k] / metrics["active"] for k in ("entropy", "logprob_mismatch")}
        totals |= first | totals  # the correction has measured the mismatch already
    for name in ("loss", "grad_norm", "lr", "router_aux_loss", "expert_load"):
        if name in metrics:  # the last two are a mixture's
            totals[name] = totals.get(name, 0.0) + metrics[name] / updates
    for name in ("kl", "clip_fraction"):
        mean = metrics[name] / max(metrics["active"], 1.0)
        totals[name] = totals.get(name, 0.0) + mean / updates


def check_mismatch(totals: dict[str, float], limit: float | None, step: int) -> None:
    """UserError where sampler and trainer are further apart than the recipe allows."""
    mismatch = totals.get("logprob_mismatch", 0.0)  # without a correction the first update tells
    if limit is not None and not mismatch <= limit:  # nan is no answer either
        raise UserError(
            f"rollout_servers.max_logprob_mismatch={limit}: at step {step} sampler and trainer are "
            f"{mismatch:.3g} apart in mean |delta log p|; do the servers compute in the trainer's "
            "precision, and at temperature 1? `q3mega logprob-mismatch` compares them"
        )


def record(
    log: Log,
    step: int,
    rollouts: list[Rollout],
    samples: list[Sample],
    totals: dict[str, float],
) -> None:
    """One line of metrics.jsonl, and one sample."""
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
        **size([sample_of(r, 0.0) for r in rollouts]),
        **size(samples, "trained_"),
        **{f"reward/{task}": statistics.fmean(v) for task, v in sorted(by_task.items())},
        **{f"reward_part/{name}": statistics.fmean(v) for name, v in sorted(by_reward.items())},
        **{f"reward_std/{name}": statistics.pstdev(v) for name, v in sorted(by_reward.items())},
    }
