"""Stage 7, general RL: five capabilities, three kinds of reward, tools with a real environment.

Rule rewards check instructions, modes and final answers; a judge compares with the reference; a
preference model scores open queries (Qwen3 report, section 4.4). A share of reasoning prompts and a
KL to the start of the stage keep what it knew. The tasks are the generated ones, or the recipe's
files and sets with a share each.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from q3mega.algorithms.entropy_control import EntropyController
from q3mega.config.stages import GeneralRL
from q3mega.data.chat import last_flag, render
from q3mega.engine import parallel
from q3mega.environments.environment import environment_of
from q3mega.evaluation import intervals
from q3mega.evaluation.answers import Mode, flagged
from q3mega.problems import FAMILIES, Problem, generate
from q3mega.problems.generated import general
from q3mega.problems.pool import Pool
from q3mega.rewards import reward_names, reward_of
from q3mega.rollout import Sampler, SamplingParams
from q3mega.rollout.episodes import run_episodes
from q3mega.stages.common.modes import both_modes
from q3mega.stages.common.rl import policy, scored_rollout
from q3mega.stages.common.scorer import Episode, Scorer
from q3mega.stages.common.stage import Stage
from q3mega.train import rl
from q3mega.train.rollouts import Rollout
from q3mega.train.schedule import SynchronousSchedule

FOLLOW = 0.3  # of the general prompts are conversations with random mode flags
HELD_OUT = 100  # problems of each task of one's own
MODES: tuple[Mode, Mode] = ("think", "no_think")
FLAGGED = 0.6  # of the problems that are asked in thinking mode, which is the default
_THINKS: dict[str, Mode] = {"reasoning": "think"}  # capability -> mode, else no_think
AUDITED = 5  # problems of each task that every known cheat is tried on


def run(stage: Stage[GeneralRL]) -> None:
    """Train judge and preference model, learn from rollouts of all tasks, audit, evaluate."""
    config = stage.config
    source = stage.start()
    tasks = Tasks(stage)
    scorer = Scorer(stage, tasks.samples(1))
    engine = stage.engine(source, steps=config.steps * config.updates)
    sampler = stage.sampler(engine)

    def roll_out(step: int) -> list[Rollout]:
        numbered = parallel.local_share(list(enumerate(tasks.prompts(step))))
        groups = [number for number, _ in numbered]
        problems = [p for _, p in numbered for _ in range(config.rollouts)]
        seed = stage.seed("rollout", step, parallel.data_rank())
        routes = config.routing_replay == "r3"
        params = SamplingParams(config.max_tokens, config.temperature, seed=seed, routes=routes)
        episodes = played(stage, sampler, problems, params)
        verdicts = scorer(problems, episodes, config.max_tokens)
        return [
            scored_rollout(prompt, c, groups[i // config.rollouts], p, v, "\n\n".join(turns))
            for i, ((prompt, c, turns), v, p) in enumerate(
                zip(episodes, verdicts, problems, strict=True)
            )
        ]

    rl.train(
        engine,
        SynchronousSchedule(roll_out, staleness=int(config.schedule == "one_step_off")),
        policy(stage, config),
        EntropyController(
            config.entropy_target_ratio, config.entropy_coef_step, config.entropy_coef_max
        ),
        prompts=tasks.prompts,
        steps=config.steps,
        folder=stage.dir / "checkpoints",
        log=stage.log(config.steps),
        save_every=max(1, config.save_every // config.updates),
        reference=stage.engine(source) if config.kl_coef else None,
    )
    stage.write("data/audit.json", scorer.audit(tasks.samples(AUDITED)))
    results = both_modes(stage, engine) | scorer.quality()
    stage.finish(engine, results | own_tasks(stage, sampler, tasks, scorer))


class Tasks:
    """What the stage trains on: reasoning problems, and general tasks mostly without thinking."""

    def __init__(self, stage: Stage[GeneralRL]) -> None:
        self.stage = stage
        self.pools = {name: Pool([name]) for name in stage.config.problems}

    def prompts(self, step: int) -> list[Problem]:
        """The problems of a rollout batch, each in its mode."""
        config, rng = self.stage.config, random.Random(self.stage.seed("prompts", step))
        reasoning = int(config.prompts * config.reasoning_share)
        pool = self.stage.pool
        out = []
        for i in range(reasoning):
            domain = pool.domains[i % len(pool.domains)]
            (problem,) = pool.draw(domain, 1, seed=rng.randrange(2**31))
            out.append(_in_mode(problem, "think", flag=rng.random() < FLAGGED))
        general_ones = self._own if self.pools else self._generated
        return out + [general_ones(rng, step * 7 + i) for i in range(config.prompts - reasoning)]

    def _generated(self, rng: random.Random, turn: int) -> Problem:
        if rng.random() < FOLLOW:
            return general.draw_follow(rng)
        others = [f for f in general.GENERAL if f != "think_follow"]
        return _in_mode(general.draw(rng, [others[turn % len(others)]]), "no_think")

    def _own(self, rng: random.Random, turn: int) -> Problem:
        names, shares = zip(*self.stage.config.problems.items(), strict=True)
        pool = self.pools[rng.choices(names, shares)[0]]
        (problem,) = pool.draw(rng.choice(pool.domains), 1, seed=rng.randrange(2**31))
        drawn: Mode = rng.choice(MODES)
        mode = _own_mode(problem) or drawn
        return _in_mode(problem, mode, flag=mode == "no_think" or rng.random() < FLAGGED)

    def samples(self, n: int) -> list[Problem]:
        """n problems of every task, the reasoning ones included, each in its mode."""
        seed = self.stage.seed("audit")
        if not self.pools:
            drawn = [p for family in FAMILIES for p in generate(family, n, seed=seed)]
            return [
                p if "mode" in p.meta else _in_mode(p, _THINKS.get(p.capability, "no_think"))
                for p in drawn
            ]
        pools = (self.stage.pool, *self.pools.values())
        drawn = [p for pool in pools for d in pool.domains for p in pool.draw(d, n, seed)]
        return [_in_mode(p, _own_mode(p) or "think") for p in drawn]


def played(
    stage: Stage[GeneralRL], sampler: Sampler, problems: Sequence[Problem], params: SamplingParams
) -> list[Episode]:
    """(prompt, completion, the assistant's turns) of an episode of each problem."""
    texts = (render(p.messages, tools=p.tools, add_generation_prompt=True) for p in problems)
    prompts = [stage.tokenizer.encode(text) for text in texts]
    environments = [environment_of(p) for p in problems]
    episodes = run_episodes(sampler, stage.tokenizer, prompts, environments, params)
    return [(prompt, c, turns) for prompt, (c, turns) in zip(prompts, episodes, strict=True)]


def own_tasks(
    stage: Stage[GeneralRL], sampler: Sampler, tasks: Tasks, scorer: Scorer
) -> dict[str, dict[str, float]]:
    """The mean score of each file or set, on its held-out problems in the mode that they ask."""
    results = {}
    for name, pool in tasks.pools.items():
        held = [_in_mode(p, _own_mode(p) or "think") for p in pool.held_out(HELD_OUT)]
        local_problems = parallel.local_share(held)
        seed = stage.seed("own", name, parallel.data_rank())
        params = SamplingParams(stage.answer_tokens, 0.6, seed=seed)
        episodes = played(stage, sampler, local_problems, params)
        verdicts = scorer(local_problems, episodes, stage.answer_tokens)
        scores = parallel.gather_over_data([v.score for v in verdicts])
        results[f"score/{Path(name).stem}"] = intervals.averages([[score] for score in scores])
    return results


def _own_mode(problem: Problem) -> Mode | None:
    """The mode that a problem asks for by itself: its file says so, or its flags do."""
    if "mode" in reward_names(reward_of(problem)):
        return last_flag(problem.messages) or "think"
    return problem.meta.get("mode")


def _in_mode(problem: Problem, mode: Mode, flag: bool = True) -> Problem:
    """The problem with its mode's flag, or none, and the mode where the rewards look for it.

    One that is about its own flags gets no other.
    """
    flag = flag and "mode" not in reward_names(reward_of(problem))
    turns = tuple(flagged(problem, mode if flag else None))
    return replace(problem, messages=turns, meta=problem.meta | {"mode": mode})
