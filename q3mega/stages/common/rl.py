"""What the RL stages share: from settings to the loop, and from a problem to a scored rollout."""

from collections.abc import Callable
from pathlib import Path

from q3mega.algorithms.entropy_control import EntropyController
from q3mega.algorithms.rollout_correction import RolloutCorrection
from q3mega.config.rl import VARIANTS, RLSettings
from q3mega.config.stage import StageConfig
from q3mega.data.chat import render
from q3mega.engine import Engine, parallel
from q3mega.ops.grpo_loss import Settings as GrpoSettings
from q3mega.problems import Problem
from q3mega.rewards import Verdict, score_problem
from q3mega.rollout import Completion, Sampler, SamplingParams
from q3mega.rollout.base import text_of
from q3mega.rollout.weight_sync.sampler import InterruptibleSampler, WeightSyncedSampler
from q3mega.stages.common.stage import Stage
from q3mega.train import rl
from q3mega.train.rollouts import Rollout
from q3mega.train.samples import PolicySettings
from q3mega.train.schedule import AsynchronousSchedule, Schedule, SynchronousSchedule


def learn(
    stage: Stage[StageConfig],
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
        EntropyController(
            config.entropy_target_ratio, config.entropy_coef_step, config.entropy_coef_max
        ),
        prompts=prompts,
        steps=config.steps,
        folder=stage.dir / "checkpoints" / part,
        log=stage.log(config.steps, part),
        save_every=max(1, stage.config.save_every // config.updates),
        reference=stage.engine(source) if config.kl_coef else None,
        watch=watch,
    )


def schedule(
    stage: Stage[StageConfig],
    sampler: Sampler,
    prompts: Callable[[int], list[Problem]],
    config: RLSettings,
) -> Schedule:
    """How the prompts of a step are sampled and scored, and when."""

    def batch(step: int) -> list[tuple[int, Problem]]:
        return list(enumerate(prompts(step)))

    def this_rank(step: int) -> list[Rollout]:
        seed = stage.seed("rollout", step, parallel.data_rank())
        return sampled_and_scored(stage, sampler, parallel.local_share(batch(step)), config, seed)

    if config.schedule != "asynchronous":
        return SynchronousSchedule(this_rank, staleness=int(config.schedule == "one_step_off"))
    assert isinstance(sampler, WeightSyncedSampler)  # the recipe names servers
    background = InterruptibleSampler(sampler)

    def all_ranks(step: int) -> list[Rollout]:
        return sampled_and_scored(
            stage, background, batch(step), config, stage.seed("rollout", step)
        )

    return AsynchronousSchedule(background, all_ranks, config.staleness)


def policy(stage: Stage[StageConfig], config: RLSettings) -> PolicySettings:
    """The policy settings of a recipe's section."""
    loss = GrpoSettings(
        variant=config.variant,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coef=config.kl_coef,
    )
    correction = None
    if config.rollout_correction != "none":
        caps = config.tis_cap, config.mis_band, config.sequence_delta
        correction = RolloutCorrection(config.rollout_correction, *caps)
    servers = stage.config.sampling_servers
    return PolicySettings(
        updates=config.updates,
        capacity=stage.config.micro_batch_tokens,
        max_tokens=config.max_tokens,
        aggregate=config.aggregation,
        scale_by_std=VARIANTS[config.variant].scale_by_std,
        loss=loss,
        overlong=config.overlong,
        correction=correction,
        temperature=config.temperature,
        max_logprob_mismatch=servers.max_logprob_mismatch if servers else None,
        routing_replay=config.routing_replay,
    )


def sampled_and_scored(
    stage: Stage[StageConfig],
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
            verdict = score_problem(p, text, tokens=len(c.tokens), max_tokens=config.max_tokens)
            rollouts.append(scored_rollout(prompt, c, group, p, verdict, text))
    return rollouts


def scored_rollout(
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
