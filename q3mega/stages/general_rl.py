"""Stage 7, general RL: five capabilities, three kinds of reward, tools with a real environment.

Rule rewards check instructions, modes and final answers; a judge compares with the reference; a
preference model scores open queries (Qwen3 report, section 4.4). Both models are trained here, from
the start of the stage. A share of reasoning prompts and a KL to that start keep what it knew.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from q3mega import evaluate
from q3mega.algorithms.entropy import EntropyController
from q3mega.algorithms.losses import normalise, scalar, supervised
from q3mega.algorithms.losses import preference as preference_loss
from q3mega.data.batch import Batch, Sample, collate
from q3mega.data.chat import parse, render
from q3mega.data.sft import chat_sample, reply_text
from q3mega.data.tasks import FAMILIES, Problem, general, generate
from q3mega.engine import Engine, Head, parallel
from q3mega.evaluate import Mode, flagged
from q3mega.rewards import TASK_REWARD, Verdict, judge_answer, score
from q3mega.rewards.audit import probes
from q3mega.rewards.judge import judge, judge_examples
from q3mega.rewards.mode import mode_of
from q3mega.rewards.preference import preference
from q3mega.rollout import SamplingParams
from q3mega.rollout.episodes import run_episodes
from q3mega.rollout.logprobs import each_sequence, token_logprobs
from q3mega.rollout.tools import Environment
from q3mega.stages.mode_fusion import both_modes
from q3mega.stages.reasoning_rl import policy
from q3mega.stages.stage import Stage
from q3mega.train import reinforcement
from q3mega.train.reinforcement import Rollout
from q3mega.train.supervised import shard

FOLLOW = 0.3  # of the general prompts are conversations with random mode flags
CALL_SHARE = 0.3  # of an agent task's reward is for the call, the rest for the final answer
HELD_OUT_PAIRS = 400
AUDITED = 5  # problems of each task that every known cheat is tried on


def run(stage: Stage) -> None:
    config = stage.config
    source = stage.start()
    scorer = Scorer(stage, frozen=stage.engine(source))
    engine = stage.engine(source, steps=config.steps * config.updates)
    sampler = stage.sampler(engine)

    def roll_out(step: int) -> list[Rollout]:
        mine = prompts(stage, step)[parallel.data_rank() :: parallel.data_size()]
        groups = [parallel.data_rank() + i * parallel.data_size() for i in range(len(mine))]
        problems = [p for p in mine for _ in range(config.rollouts)]
        tokens = [stage.tokenizer.encode(_prompt(p)) for p in problems]
        seed = stage.seed("rollout", step, parallel.data_rank())
        params = SamplingParams(config.max_tokens, config.temperature, seed=seed)
        environments = [Environment(p) if p.tools else None for p in problems]
        episodes = run_episodes(sampler, stage.tokenizer, tokens, environments, params)
        verdicts = scorer(problems, [turns for _, turns in episodes])
        rollouts = [
            Rollout(prompt, c, groups[i // config.rollouts], v.score, p.family, v.reason)
            for i, (prompt, (c, _), v, p) in enumerate(
                zip(tokens, episodes, verdicts, problems, strict=True)
            )
        ]
        if config.kl_coef:
            sequences = [(r.prompt, r.completion.tokens) for r in rollouts]
            for rollout, logprobs in zip(
                rollouts, token_logprobs(scorer.frozen, sequences), strict=True
            ):
                rollout.ref_logprobs = logprobs
        return rollouts

    reinforcement.train(
        engine,
        roll_out,
        policy(stage, config),
        EntropyController(config.entropy_hold, config.entropy_step, config.entropy_limit),
        steps=config.steps,
        folder=stage.dir / "checkpoints",
        log=stage.log(config.steps),
        save_every=max(1, config.save_every // config.updates),
    )
    stage.write("data/audit.json", scorer.audit())
    stage.finish(engine, both_modes(stage, engine) | scorer.quality())


def prompts(stage: Stage, step: int) -> list[Problem]:
    """The problems of a rollout batch: reasoning ones in thinking mode, general ones mostly not."""
    config, rng = stage.config, random.Random(stage.seed("prompts", step))
    reasoning, domains = int(config.prompts * config.reasoning_share), stage.pool.domains
    out = []
    for i in range(reasoning):
        (problem,) = stage.pool.draw(domains[i % len(domains)], 1, seed=rng.randrange(2**31))
        out.append(_in_mode(problem, "think", flag=rng.random() < 0.6))
    others = [f for f in general.GENERAL if f != "think_follow"]
    for i in range(config.prompts - reasoning):
        if rng.random() < FOLLOW:
            out.append(general.draw_follow(rng))
            continue
        problem = general.draw(rng, [others[(step * 7 + i) % len(others)]])
        out.append(_in_mode(problem, "no_think"))
    return out


def _in_mode(problem: Problem, mode: Mode, flag: bool = True) -> Problem:
    """The problem with its mode's flag, or none, and the mode where the rewards look for it."""
    turns = tuple(flagged(problem, mode if flag else None))
    return replace(problem, messages=turns, meta=problem.meta | {"mode": mode})


def _prompt(problem: Problem) -> str:
    return render(problem.messages, tools=problem.tools, add_generation_prompt=True)


class Scorer:
    """All rewards of the stage, with the two models that some of them need."""

    def __init__(self, stage: Stage, frozen: Engine) -> None:
        self.stage, self.frozen = stage, frozen
        self.tokenizer = stage.tokenizer
        self.judge_ids = [self.tokenizer.encode(word)[0] for word in ("yes", "no")]
        self.judge_model = _trained_once(stage, "judge_model", train_judge)
        self.model = _trained_once(stage, "preference_model", train_preference)
        pairs = general.preference_pairs(64, stage.seed("calibrate"))
        typical = torch.tensor(self.scalars([(p, text) for p, *texts in pairs for text in texts]))
        self.mean, self.std = float(typical.mean()), float(typical.std())

    def __call__(self, problems: list[Problem], episodes: list[list[str]]) -> list[Verdict]:
        """One verdict an episode. Whatever is in the wrong mode, or malformed, earns nothing."""
        verdicts = [self._rule(p, turns) for p, turns in zip(problems, episodes, strict=True)]
        for kind, fn in (("judge", self._judge), ("preference", self._prefer)):
            rows = [
                i for i, p in enumerate(problems) if TASK_REWARD.get(p.family, ("", ""))[0] == kind
            ]
            scored = (
                fn([problems[i] for i in rows], [episodes[i][-1] for i in rows]) if rows else []
            )
            for i, verdict in zip(rows, scored, strict=True):
                verdicts[i] = verdict
        for i, (problem, turns) in enumerate(zip(problems, episodes, strict=True)):
            if mode_of(turns[0]) != problem.meta["mode"]:
                verdicts[i] = Verdict(0.0, "wrong mode or malformed think block")
        return verdicts

    def _rule(self, problem: Problem, turns: list[str]) -> Verdict:
        row = vars(problem)
        if problem.capability == "reasoning":
            return judge_answer(problem, turns[-1])
        kind, name = TASK_REWARD[problem.family]
        if kind != "rule":
            return Verdict(0.0, "not a rule")
        verdict = score(name, turns[-1], row)
        if not problem.tools:
            return verdict
        call = score("tool_call", turns[0], row)
        final = verdict.score if len(turns) > 1 else 0.0
        return Verdict(
            CALL_SHARE * call.score + (1 - CALL_SHARE) * final, f"{call.reason}, {verdict.reason}"
        )

    def _judge(self, problems: list[Problem], texts: list[str]) -> list[Verdict]:
        return judge(texts, [vars(p) for p in problems], self.probability)

    def _prefer(self, problems: list[Problem], texts: list[str]) -> list[Verdict]:
        replies = [parse(t).content for t in texts]
        return preference(
            self.scalars(list(zip(problems, replies, strict=True))), self.mean, self.std
        )

    def probability(self, judge_prompts: list[str]) -> list[float]:
        """The judge's P(yes) against P(no) for each question, asked without thinking."""
        turns = [[{"role": "user", "content": text}] for text in judge_prompts]
        texts = [render(t, add_generation_prompt=True, enable_thinking=False) for t in turns]

        def yes(head: Head, batch: Batch) -> list[float]:
            last = head.hidden[batch.cu_seqlens[1:].long() - 1]
            ids = torch.tensor(self.judge_ids, device=last.device)
            return (last @ head.rows(ids).T).softmax(-1)[:, 0].tolist()

        return each_sequence(self.judge_model, self.tokenizer.encode_batch(texts), yes)

    def scalars(self, replies: list[tuple[Problem, str]]) -> list[float]:
        """The preference model's scalar of each (problem, reply)."""
        texts = [preference_text(p, reply) for p, reply in replies]

        def value(head: Head, batch: Batch) -> list[float]:
            return scalar(head, batch, self.tokenizer.eod).tolist()

        return each_sequence(self.model, self.tokenizer.encode_batch(texts), value)

    def audit(self) -> dict[str, dict[str, Any]]:
        """Of every task the known cheat that earns most, and what all earn on average."""
        rows = {}
        for family in FAMILIES:
            mode: Mode = "think" if FAMILIES[family].capability == "reasoning" else "no_think"
            asked = [
                p if "mode" in p.meta else _in_mode(p, mode)
                for p in generate(family, AUDITED, seed=self.stage.seed("audit"))
            ]
            tried = [(p, name, text) for p in asked for name, text in probes(vars(p))]
            scores = [v.score for v in self([p for p, *_ in tried], [[t] for *_, t in tried])]
            best = max(range(len(tried)), key=scores.__getitem__)
            rows[family] = {
                "reward": TASK_REWARD.get(family, ("rule", "answer"))[0],
                "probes": len(tried),
                "mean": sum(scores) / len(scores),
                "highest": scores[best],
                "probe": tried[best][1],
            }
        return rows

    def quality(self) -> dict[str, Any]:
        """How good the two models are, on examples they have not seen."""
        pairs = general.preference_pairs(HELD_OUT_PAIRS, self.stage.seed("held out"), heldout=True)
        chosen = self.scalars([(p, better) for p, better, _ in pairs])
        rejected = self.scalars([(p, worse) for p, _, worse in pairs])
        right = [float(a > b) for a, b in zip(chosen, rejected, strict=True)]
        examples = judge_examples(HELD_OUT_PAIRS, self.stage.seed("judge held out"))
        said = self.probability([prompt for prompt, _ in examples])
        agree = [
            float((p > 0.5) == (truth == "yes"))
            for p, (_, truth) in zip(said, examples, strict=True)
        ]
        return {
            "preference_pairwise_accuracy": evaluate.proportion(right),
            "judge_accuracy": evaluate.proportion(agree),
        }


def preference_text(problem: Problem, reply: str) -> str:
    turn = {"role": "assistant", "content": reply}
    return render(
        [problem.messages[-1] | {"content": problem.question.removesuffix(" /no_think")}, turn]
    )


def _trained_once(stage: Stage, name: str, train: Callable[[Stage], Engine]) -> Engine:
    """The model of data/<name>; the first time `train` makes it."""
    folder = stage.data / name
    if not stage.prepared(f"{name}/DONE"):
        stage.save_hf(train(stage), folder)
        if stage.leads:
            (folder / "DONE").touch()
        stage.barrier()
    return stage.engine(folder)


def train_judge(stage: Stage) -> Engine:
    """SFT on the judge's question, each step's examples drawn anew."""
    config = stage.config.judge
    model = stage.engine(
        stage.start(), steps=config.steps, kind="muon", lr=config.lr, adam_lr=config.lr / 3,
        decay="linear",
    )  # fmt: skip
    for step in range(config.steps):
        samples = [
            chat_sample(
                stage.tokenizer,
                [{"role": "user", "content": prompt}],
                reply_text("", verdict),
                prefilled=True,
            )
            for prompt, verdict in judge_examples(config.questions, stage.seed("judge", step))
        ]
        model.train_step(shard(normalise(samples), stage.config.micro_batch_tokens), supervised)
    return model


def train_preference(stage: Stage) -> Engine:
    """Bradley-Terry on pairs, each step's drawn anew."""
    config = stage.config.preference
    model = stage.engine(
        stage.start(), steps=config.steps, lr=config.lr, kind="adamw", decay="linear"
    )
    loss = preference_loss(stage.tokenizer.eod, 1.0 / config.pairs)
    for step in range(config.steps):
        pairs = general.preference_pairs(config.pairs, stage.seed("pairs", step))
        mine = pairs[parallel.data_rank() :: parallel.data_size()]
        texts = [preference_text(p, reply) for p, *both in mine for reply in both]
        samples = [Sample(t, [0.0] * len(t)) for t in stage.tokenizer.encode_batch(texts)]
        model.train_step([collate(samples)], loss)
    return model
