"""Stage 5, reasoning RL: GRPO on verifiable problems.

Problems obey the report's four rules (section 4.2): not used in the cold start, learnable for the
model at hand, as hard as possible, and of every domain. Then: many rollouts a prompt, several
off-policy updates a rollout batch, groups without a signal dropped, entropy held by a controller.
"""

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.rollout_correction import Correction
from q3mega.config.servers import RolloutEngine
from q3mega.config.stages import RLSettings
from q3mega.data.chat import render
from q3mega.engine import Engine, parallel
from q3mega.errors import UserError
from q3mega.evaluation import evaluate
from q3mega.problems import Problem
from q3mega.rewards import Verdict, judge_answer
from q3mega.rollout import Completion, Sampler, SamplingParams
from q3mega.rollout.base import text_of
from q3mega.rollout.weight_sync.sampler import InterruptibleSampler, WeightSyncedSampler
from q3mega.stages.common.filter_report import Funnel
from q3mega.stages.common.stage import Stage
from q3mega.train import rl
from q3mega.train.rl import PolicySettings
from q3mega.train.rollouts import Rollout
from q3mega.train.schedule import Beside, InTurn, Schedule


def run(stage: Stage) -> None:
    config = stage.config
    source = stage.start()
    engine = stage.engine(source, steps=config.steps * config.updates)
    if not stage.prepared("problems.json"):
        select(stage, stage.sampler(engine))
    problems = [Problem(**row) for row in json.loads((stage.data / "problems.json").read_text())]
    learn(stage, engine, source, problems, config)
    results = evaluate.thinking(
        stage.sampler(engine), stage.tokenizer, stage.held_out(), stage.seed("eval"),
        max_tokens=stage.answer_tokens,
    )  # fmt: skip
    stage.finish(engine, results | evaluate.entropy_ratio(stage.dir / "metrics.jsonl"))


def learn(
    stage: Stage,
    engine: Engine,
    source: Path,
    problems: list[Problem],
    config: RLSettings,
    part: str = "",
    watch: Callable[[int], None] | None = None,
) -> None:
    """The loop, on prompts that walk through `problems` in order; `part` names a comparison run.

    source: the weights that the engine started from, the reference of the KL.
    """

    def prompts(step: int) -> list[Problem]:
        """In order, and from the beginning again."""
        first = (step - 1) * config.prompts
        return [problems[(first + i) % len(problems)] for i in range(config.prompts)]

    rl.train(
        engine,
        schedule(stage, stage.sampler(engine), prompts, config),
        policy(stage, config),
        EntropyController(config.entropy_hold, config.entropy_step, config.entropy_limit),
        prompts=prompts,
        steps=config.steps,
        folder=stage.dir / "checkpoints" / part,
        log=stage.log(config.steps, part),
        save_every=max(1, stage.config.save_every // config.updates),
        reference=stage.engine(source) if config.kl_coef else None,
        watch=watch,
    )


def schedule(
    stage: Stage,
    sampler: Sampler,
    prompts: Callable[[int], list[Problem]],
    config: RLSettings,
) -> Schedule:
    """How the prompts of a step are sampled and scored, and when."""

    def batch(step: int) -> list[tuple[int, Problem]]:
        return list(enumerate(prompts(step)))

    def own_share(step: int) -> list[Rollout]:
        rank, size = parallel.data_rank(), parallel.data_size()
        seed = stage.seed("rollout", step, rank)
        return answered(stage, sampler, batch(step)[rank::size], config, seed)

    if config.schedule != "asynchronous":
        return InTurn(own_share, staleness=int(config.schedule == "one_step_off"))
    assert isinstance(sampler, WeightSyncedSampler)  # the recipe names servers
    beside = InterruptibleSampler(sampler)

    def whole(step: int) -> list[Rollout]:
        return answered(stage, beside, batch(step), config, stage.seed("rollout", step))

    return Beside(beside, whole, config.staleness)


def policy(stage: Stage, config: RLSettings) -> PolicySettings:
    loss = {
        "variant": config.variant,
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "kl_coef": config.kl_coef,
    }
    own = {"dr_grpo": "constant", "dapo": "token", "bnpo": "token", "cispo": "token"}
    correction = None
    if config.correction != "none":
        caps = config.tis_cap, config.mis_band, config.sequence_delta
        correction = Correction(config.correction, *caps)
    engine: RolloutEngine | None = getattr(stage.config, "engine", None)
    return PolicySettings(
        updates=config.updates,
        capacity=stage.config.micro_batch_tokens,
        max_tokens=config.max_tokens,
        aggregate=config.aggregate or own.get(config.variant, "sequence"),
        scale_by_std=config.variant != "dr_grpo",
        loss=loss,
        overlong=config.overlong,
        correction=correction,
        temperature=config.temperature,
        max_gap=engine.max_gap if engine else None,
        routing_replay=config.routing_replay,
    )


def answered(
    stage: Stage,
    sampler: Sampler,
    batch: list[tuple[int, Problem]],
    config: RLSettings,
    seed: int,
) -> list[Rollout]:
    """(group, problem) pairs: sampled in thinking mode, scored by the rules."""
    prompts = [
        stage.tokenizer.encode(render(p.messages, tools=p.tools, add_generation_prompt=True))
        for _, p in batch
    ]
    params = SamplingParams(
        config.max_tokens, config.temperature, n=config.rollouts, seed=seed,
        routes=config.routing_replay == "r3",
    )  # fmt: skip
    rollouts = []
    for (group, p), prompt, tries in zip(
        batch, prompts, sampler.generate(prompts, params), strict=True
    ):
        for c in tries:
            text = text_of(c, stage.tokenizer)
            verdict = judge_answer(p, text, tokens=len(c.tokens), max_tokens=config.max_tokens)
            rollouts.append(judged(prompt, c, group, p, verdict, text))
    return rollouts


def judged(
    prompt: list[int], completion: Completion, group: int, problem: Problem, verdict: Verdict,
    text: str,
) -> Rollout:  # fmt: skip
    """A completion with what its problem's reward says of it."""
    return Rollout(
        prompt=prompt,
        completion=completion,
        group=group,
        reward=verdict.score,
        task=problem.family,
        reason=verdict.reason,
        parts=verdict.parts,
        problem=problem.id,
        text=text,
    )


def select(stage: Stage, sampler: Sampler) -> None:
    """The four rules; leaves problems.json and the funnel in data/."""
    rules, funnel = stage.config.selection, Funnel(vars)
    used = {query.id for query in stage.cold_start_queries()}
    low, high = rules.band

    pool = stage.problems(rules.pool // len(stage.pool.domains), "pool")
    funnel.step("problems", pool)
    seen = ["used in the cold start" if p.id in used else None for p in pool]
    pool = funnel.keep("problem", pool, seen)

    params = SamplingParams(stage.config.max_tokens, n=rules.tries, seed=stage.seed("select"))
    found = evaluate.answers(sampler, stage.tokenizer, pool, params)
    judged = {
        p.id: [a.correct for a in tries if a.correct is not None]
        for p, tries in zip(pool, found, strict=True)
    }
    unjudged = (None if judged[p.id] else "no try could be judged" for p in pool)
    pool = funnel.keep("problem", pool, unjudged)
    rates = {p.id: statistics.fmean(judged[p.id]) for p in pool}
    for right in range(rules.tries + 1):
        members = [p for p in pool if sum(judged[p.id]) == right]
        funnel.step(f"right in {right} of {rules.tries} tries", members)
    unfit = (
        "not learnable" if rates[p.id] <= low else "too easy" if rates[p.id] >= high else None
        for p in pool
    )
    learnable = funnel.keep("problem", pool, unfit)

    def hardest_first(problem: Problem) -> tuple[float, int, str]:
        return rates[problem.id], -problem.difficulty, problem.id

    chosen: list[Problem] = []
    for domain in stage.pool.domains:
        members = sorted((p for p in learnable if p.family == domain), key=hardest_first)
        chosen += members[: rules.keep // len(stage.pool.domains)]
    kept = {p.id for p in chosen}
    easier = (None if p.id in kept else "easier than the rest of its domain" for p in learnable)
    funnel.keep("problem", learnable, easier)
    funnel.step("problems to train on", chosen)
    if not chosen:
        raise UserError(
            f"stages.{stage.name}.selection.pool={rules.pool}: no problem is right in more than "
            f"{low:.0%} and less than {high:.0%} of the tries; strengthen the cold start, widen "
            "the pool, or raise tries"
        )
    random.Random(stage.seed("order")).shuffle(chosen)
    funnel.write(stage)
    stage.write("data/problems.json", [vars(p) for p in chosen])
    stage.barrier()
