"""The second loop: roll out, score, compute advantages, update. Both RL stages are this loop."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.losses import normalise, policy_gradient
from q3mega.data.batch import Sample
from q3mega.engine import Engine, parallel
from q3mega.problems import Problem
from q3mega.train import stopping
from q3mega.train.ledger import FILE as LEDGER
from q3mega.train.ledger import Ledger
from q3mega.train.log import Log
from q3mega.train.rl_metrics import add_update, check_mismatch, record
from q3mega.train.rollouts import Batches, pack, unpack
from q3mega.train.samples import (
    PolicySettings,
    add_reference_logprobs,
    apply_rollout_correction,
    compute_advantages,
    drop_not_finite,
)
from q3mega.train.schedule import Schedule


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
        drop_not_finite(samples, dropped)
        corrected = apply_rollout_correction(engine, rollouts, samples, dropped, settings)
        if reference:
            add_reference_logprobs(reference, rollouts, samples, settings)
            drop_not_finite(samples, dropped)
        ledger.dropped(step, dropped)
        totals = {"staleness": updates - oldest, **corrected}
        check_mismatch(totals, settings.max_logprob_mismatch, step)
        for indices in _mini_batches(list(samples), settings.updates):
            metrics = _update(engine, [samples[i] for i in indices], settings, entropy)
            learnt = [i for i in indices if i not in dropped]
            if "skipped" in metrics:
                ledger.dropped(step, dict.fromkeys(learnt, "skipped update"))
            else:
                updates += 1
                ledger.used(step, updates, learnt)
            add_update(totals, metrics, settings.updates)
            check_mismatch(totals, settings.max_logprob_mismatch, step)
        totals["entropy_coef"] = entropy.coefficient
        if "entropy" in totals:  # else nothing was learnt from
            entropy.update(totals["entropy"])
        record(log, step, rollouts, list(samples.values()), totals)
        if watch:
            watch(step)
    engine.finish_saving()


def _update(
    engine: Engine, samples: list[Sample], settings: PolicySettings, entropy: EntropyController
) -> dict[str, float]:
    loss = policy_gradient(
        replace(settings.loss, entropy_coef=entropy.coefficient), settings.temperature
    )
    weighted = normalise(samples, settings.aggregate, settings.max_tokens)
    return engine.train_step(parallel.shard_by_length(weighted, settings.capacity), loss)


def _mini_batches(indices: list[int], parts: int) -> list[list[int]]:
    """Mini-batches of nearly equal size; members of a group land in different ones."""
    return [indices[i::parts] for i in range(parts) if indices[i::parts]]


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
