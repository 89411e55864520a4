"""The rewards of general RL, and the two models that some of them ask.

Rules judge by themselves. The judge, which has a reference, and the preference model, which has
none, are trained here from the start of the stage, or the judge is one of the recipe's.
"""

import functools
import random
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from q3mega.algorithms.losses import normalise, scalar, supervised
from q3mega.algorithms.losses import preference as preference_loss
from q3mega.chat_models.reference_judge import ReferenceJudge
from q3mega.config.servers import ChatModelSpec
from q3mega.config.stages import GeneralRL
from q3mega.data.batch import Batch, Sample, collate
from q3mega.data.chat import parse, render
from q3mega.data.sft import chat_sample, reply_text
from q3mega.engine import Engine, LMHead, parallel
from q3mega.engine.parallel import shard_by_length
from q3mega.evaluation import intervals
from q3mega.evaluation.reward_probes import probes
from q3mega.problems import FAMILIES, Problem, files
from q3mega.problems.generated import general
from q3mega.rewards import MODELS, Verdict, model_rewards_of, score, score_problem
from q3mega.rewards.mode import mode_of
from q3mega.rewards.models.judge import judge, judge_examples
from q3mega.rewards.models.preference import preference
from q3mega.rollout import Completion
from q3mega.rollout.logprobs import each_sequence
from q3mega.stages.common.chat_models import chat_model
from q3mega.stages.common.stage import Stage

CALL_SHARE = 0.3  # of a generated agent task's reward is for the call, the rest for the answer
HELD_OUT_PAIRS = 400
_FLAG = re.compile(r" ?/(think|no_think)$")

Judged = Callable[[Sequence[Problem], Sequence[str]], list[Verdict]]
Pairs = list[tuple[Problem, str, str]]
Episode = tuple[list[int], Completion, list[str]]  # prompt, completion, the assistant's turns


class Scorer:
    """All rewards of the stage, with the models that its tasks ask.

    tasks: problems of every task; none for the generated ones, which ask both models.
    """

    def __init__(self, stage: Stage[GeneralRL], tasks: Sequence[Problem] = ()) -> None:
        self.stage = stage
        models = {name for p in tasks for name in model_rewards_of(p)} if tasks else set(MODELS)
        self.judge = _judge(stage) if "judge" in models else None
        self.preference = PreferenceModel(stage) if "preference" in models else None

    def __call__(
        self, problems: Sequence[Problem], episodes: Sequence[Episode], max_tokens: int
    ) -> list[Verdict]:
        """One verdict an episode of turns of max_tokens. What is in the wrong mode, or malformed,
        earns nothing, and no model is asked about it."""
        lengths = [sum(completion.mask) for _, completion, _ in episodes]
        return self._judge(problems, [turns for *_, turns in episodes], lengths, max_tokens)

    def _judge(
        self,
        problems: Sequence[Problem],
        episodes: Sequence[list[str]],
        lengths: Sequence[int],
        max_tokens: int,
    ) -> list[Verdict]:
        obedient = [
            mode_of(turns[0]) == p.meta["mode"] for p, turns in zip(problems, episodes, strict=True)
        ]
        verdicts: list[dict[str, Verdict]] = [{} for _ in problems]
        for name, model in (("judge", self.judge), ("preference", self.preference)):
            rows = [
                i for i, p in enumerate(problems) if obedient[i] and name in model_rewards_of(p)
            ]
            if model:  # with no rows as well: ranks may meet in it
                replies = [episodes[i][-1] for i in rows]
                for i, v in zip(rows, model([problems[i] for i in rows], replies), strict=True):
                    verdicts[i][name] = v
        return [
            _verdict(p, turns, scored=scored, tokens=n, max_tokens=max_tokens * len(turns))
            if good
            else Verdict(0.0, "wrong mode or malformed think block")
            for p, turns, scored, good, n in zip(
                problems, episodes, verdicts, obedient, lengths, strict=True
            )
        ]

    def audit(self, tasks: Sequence[Problem]) -> dict[str, dict[str, Any]]:
        """Of every task the known cheat that earns most, and what all earn on average, of those
        that can be judged."""
        by_task: dict[str, list[Problem]] = {}
        for problem in tasks:
            by_task.setdefault(problem.family, []).append(problem)
        rows = {}
        for task, members in by_task.items():
            tried = [(p, name, text) for p in members for name, text in probes(p.row)]
            problems, cheats = [p for p, *_ in tried], [[text] for *_, text in tried]
            verdicts = self._judge(problems, cheats, [0] * len(tried), max_tokens=1)
            earned = {i: v.score for i, v in enumerate(verdicts) if v.score is not None}
            if not earned:
                continue
            best = max(earned, key=earned.__getitem__)
            rows[task] = {
                "reward": ", ".join(model_rewards_of(members[0])) or "rule",
                "probes": len(earned),
                "mean": statistics.fmean(earned.values()),
                "highest": earned[best],
                "probe": tried[best][1],
            }
        return rows

    def quality(self) -> dict[str, Any]:
        """How good the models are, on examples they have not seen."""
        results: dict[str, Any] = self.judge.quality() if self.judge else {}
        return results | (self.preference.quality() if self.preference else {})


def _verdict(problem: Problem, turns: list[str], **facts: Any) -> Verdict:
    verdict = score_problem(problem, turns[-1], **facts)
    if problem.family not in FAMILIES or not problem.tools:
        return verdict
    call = score("tool_call", turns[0], problem.row)
    reason = f"{call.reason}, {verdict.reason}"
    final = verdict.score if len(turns) > 1 else 0.0
    if call.score is None or final is None:
        return Verdict(None, reason)
    total = CALL_SHARE * call.score + (1 - CALL_SHARE) * final
    return Verdict(total, reason, {"tool_call": call.score, "answer": final})


# -- the judge -------------------------------------------------------------------------------------


def _judge(stage: Stage[GeneralRL]) -> "TrainedJudge | AskedJudge":
    spec = stage.config.judge_model
    return AskedJudge(stage, spec) if spec else TrainedJudge(stage)


class TrainedJudge:
    """A small model that was taught to compare a short answer with the reference."""

    def __init__(self, stage: Stage[GeneralRL]) -> None:
        self.stage, self.tokenizer = stage, stage.tokenizer
        self.ids = [self.tokenizer.encode(word)[0] for word in ("yes", "no")]
        self.model = _trained_once(stage, "judge_model", train_judge)

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        return judge(texts, [vars(p) for p in problems], self.probability)

    def probability(self, prompts: list[str]) -> list[float]:
        """P(yes) against P(no) for each question, asked without thinking."""
        turns = [[{"role": "user", "content": text}] for text in prompts]
        texts = [render(t, add_generation_prompt=True, enable_thinking=False) for t in turns]

        def yes(head: LMHead, batch: Batch) -> list[float]:
            last = head.hidden[batch.cu_seqlens[1:].long() - 1]
            ids = torch.tensor(self.ids, device=last.device)
            return (last @ head.rows(ids).T).softmax(-1)[:, 0].tolist()

        return each_sequence(self.model, self.tokenizer.encode_batch(texts), yes)

    def quality(self) -> dict[str, Any]:
        """How good the model is on examples that it has not seen."""
        examples = judge_examples(HELD_OUT_PAIRS, self.stage.seed("judge held out"))
        probabilities = self.probability([prompt for prompt, _ in examples])
        agree = [
            float((p > 0.5) == (truth == "yes"))
            for p, (_, truth) in zip(probabilities, examples, strict=True)
        ]
        return {"judge_accuracy": intervals.proportion(agree)}


class AskedJudge:
    """The recipe's judge, which grades against the reference (`rewards.reference_judge`)."""

    def __init__(self, stage: Stage[GeneralRL], spec: ChatModelSpec) -> None:
        self.asked = chat_model(stage, spec, "judge_model")
        self.judge = ReferenceJudge(self.asked.opinion, self.asked.count)
        self.found: dict[str, float] = {}
        if stage.config.judge_examples:
            rows = files.judged(stage.config.judge_examples)
            self.found = self.judge.calibrate([(r, r["response"], bool(r["right"])) for r in rows])

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """All ranks' answers go to the judge together, so that all ask it equally often."""
        keys = [(p.id, text) for p, text in zip(problems, texts, strict=True)]
        rows = [(p.id, text, p.row) for p, text in zip(problems, texts, strict=True)]
        every = {(i, text): row for i, text, row in parallel.gather_over_all(rows)}
        verdicts = self.judge([text for _, text in every], list(every.values()))
        by_key = dict(zip(every, verdicts, strict=True))
        return [by_key[key] for key in keys]

    def quality(self) -> dict[str, Any]:
        """How good the model is on examples that it has not seen."""
        results = self.found | {"disagreement": self.judge.disagreement}
        results["failures"] = self.asked.failed / max(1, self.asked.asked)
        return {f"judge_{name}": {"value": value} for name, value in results.items()}


def train_judge(stage: Stage[GeneralRL]) -> Engine:
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
        model.train_step(
            shard_by_length(normalise(samples), stage.config.micro_batch_tokens), supervised
        )
    return model


# -- the preference model --------------------------------------------------------------------------


class PreferenceModel:
    """Bradley-Terry on Qwen3 with a scalar, made a score by what typical replies get."""

    def __init__(self, stage: Stage[GeneralRL]) -> None:
        self.stage, self.tokenizer = stage, stage.tokenizer
        self.model = _trained_once(stage, "preference_model", train_preference)
        pairs = preference_pairs(stage, 64, "calibrate")
        typical = torch.tensor(self.scalars([(p, text) for p, *texts in pairs for text in texts]))
        self.mean, self.std = float(typical.mean()), float(typical.std())

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        replies = [parse(t).content for t in texts]
        scalars = self.scalars(list(zip(problems, replies, strict=True)))
        return preference(scalars, self.mean, self.std)

    def scalars(self, replies: list[tuple[Problem, str]]) -> list[float]:
        """The model's scalar of each (problem, reply)."""
        texts = [preference_text(p, reply) for p, reply in replies]
        if not texts:
            return []

        def value(head: LMHead, batch: Batch) -> list[float]:
            return scalar(head, batch, self.tokenizer.eod).tolist()

        return each_sequence(self.model, self.tokenizer.encode_batch(texts), value)

    def quality(self) -> dict[str, Any]:
        """How good the model is on examples that it has not seen."""
        pairs = preference_pairs(self.stage, HELD_OUT_PAIRS, "held out", heldout=True)
        chosen = self.scalars([(p, better) for p, better, _ in pairs])
        rejected = self.scalars([(p, worse) for p, _, worse in pairs])
        right = [float(a > b) for a, b in zip(chosen, rejected, strict=True)]
        return {"preference_pairwise_accuracy": intervals.proportion(right)}


def preference_text(problem: Problem, reply: str) -> str:
    """The chat without its flag, which is no matter of taste, and the reply."""
    *before, last = problem.messages
    question = {**last, "content": _FLAG.sub("", last["content"])}
    return render([*before, question, {"role": "assistant", "content": reply}])


def preference_pairs(
    stage: Stage[GeneralRL], n: int, *purpose: object, heldout: bool = False
) -> Pairs:
    """n pairs for one purpose: generated ones, or those of the recipe's file, one in ten of which
    is held out."""
    seed, name = stage.seed(*purpose), stage.config.preference.file
    if name is None:
        return general.preference_pairs(n, seed, heldout=heldout)
    side = [pair for pair in _pairs_of(name) if pair[0].heldout == heldout]
    return random.Random(seed).sample(side, min(n, len(side)))


@functools.cache
def _pairs_of(name: str) -> Pairs:
    return files.pairs(name)


def train_preference(stage: Stage[GeneralRL]) -> Engine:
    """Bradley-Terry on pairs, each step's drawn anew."""
    config = stage.config.preference
    model = stage.engine(
        stage.start(), steps=config.steps, lr=config.lr, kind="adamw", decay="linear"
    )
    loss = preference_loss(stage.tokenizer.eod, 1.0 / config.pairs)
    for step in range(config.steps):
        pairs = preference_pairs(stage, config.pairs, "pairs", step)
        local_pairs = parallel.local_share(pairs)
        texts = [preference_text(p, reply) for p, *both in local_pairs for reply in both]
        samples = [Sample(t, [0.0] * len(t)) for t in stage.tokenizer.encode_batch(texts)]
        model.train_step([collate(samples)], loss)
    return model


def _trained_once(
    stage: Stage[GeneralRL], name: str, train: Callable[[Stage[GeneralRL]], Engine]
) -> Engine:
    """The model of data/<name>; the first time `train` makes it."""
    folder = stage.data / name
    if not stage.prepared(f"{name}/DONE"):
        stage.save_hf(train(stage), folder)
        if stage.leads:
            (folder / "DONE").touch()
        stage.barrier()
    return stage.engine(folder)
