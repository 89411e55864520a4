"""Stages 8 and 9, strong-to-weak distillation: off-policy SFT, then on-policy KL to the teacher.

Off-policy, the student learns the teacher's answers in both modes; on-policy, it answers itself and
is pulled to the teacher's full distribution on its own tokens (Qwen3 report, section 4.5). The
on-policy stage makes the comparison of the report's Table 21: RL, and more off-policy data, from
the same start, all against the FLOPs of sampling, teacher and training.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from q3mega.algorithms.losses import distillation, distillation_topk
from q3mega.config.secrets import key_of
from q3mega.config.stages import DistillOnPolicy
from q3mega.data.batch import Batch, Sample, collate
from q3mega.data.chat import render
from q3mega.data.sft import chat_sample, epochs, steps_of
from q3mega.data.tokenizer import Tokenizer
from q3mega.distillation.served_teacher import ServedTeacher
from q3mega.distillation.service.client import TeacherClient
from q3mega.distillation.service.server import head_weight
from q3mega.distillation.topk import TeacherTopK, TopKWriter, WithTeacher
from q3mega.engine import Engine, Head, LossFn, parallel
from q3mega.errors import UserError
from q3mega.evaluation import evaluate
from q3mega.evaluation.evaluate import Mode, flagged
from q3mega.io import whole_records
from q3mega.model import Qwen3Shape
from q3mega.model.config import shape_of
from q3mega.problems import Problem
from q3mega.rollout import Sampler, SamplingParams
from q3mega.rollout.logprobs import top_logprobs
from q3mega.stages import pretrain, reasoning_rl
from q3mega.stages.common.fine_tune import fine_tune
from q3mega.stages.common.stage import Stage
from q3mega.train import supervised
from q3mega.train.log import Log

KEPT_AT_ONCE = 64  # samples whose top-k is in memory
NO_THINK = 0.25  # of the prompts ask for the non-thinking mode
POINTS = 4  # evaluations along each curve of the comparison
TRIES = 8  # answers a problem, for pass@8


def distill_off_policy(stage: Stage) -> None:
    config = stage.config
    base = student_base(stage)
    if not stage.prepared("samples.json"):
        samples = teacher_samples(stage, config.queries, "queries")
        stage.write("data/samples.json", [vars(s) for s in samples])
        stage.barrier()
    samples = [Sample(**row) for row in json.loads((stage.data / "samples.json").read_text())]
    if config.teacher_topk:
        keep_topk(stage, samples)
        known = WithTeacher(samples, TeacherTopK(stage.data / "topk"))
        engine = fine_tune(stage, base, known, distillation_topk("forward_kl"))
    else:
        engine = fine_tune(stage, base, samples)
    stage.finish(engine, pass_rates(stage, engine))


def distill_on_policy(stage: Stage) -> None:
    config = stage.config
    source = stage.start()
    with teacher_of(stage, shape_of(source).vocab) as teacher:
        engine = stage.engine(source, steps=config.steps)
        loss, add_teacher = taught_by(teacher, config)
        sampler, log = stage.sampler(engine), stage.log(config.steps)
        supervised.train(
            engine,
            lambda step: own_answers(stage, sampler, step),
            steps=config.steps,
            capacity=config.micro_batch_tokens,
            folder=stage.dir / "checkpoints" / "on_policy",
            log=log,
            save_every=config.save_every,
            loss_fn=loss,
            prepare=add_teacher,
            watch=watcher(stage, engine, log, config.steps),
        )
    results: dict[str, Any] = pass_rates(stage, engine)
    student, strong = engine.shape, teacher.shape
    curves = {
        "on-policy distillation": curve(stage.dir, lambda row: distilled(student, strong, row))
    }
    if config.compare_rl:
        rates = compare_rl(stage, source)
        curves["RL"] = curve(stage.dir / "rl", lambda row: reinforced(student, row))
        ratio = curves["RL"]["x"][-1] / curves["on-policy distillation"]["x"][-1]
        results |= {
            "rl_pass1": rates["pass1"],
            "rl_pass8": rates["pass8"],
            "flops_ratio_rl_over_opd": {"value": ratio, "n": 1},
        }
    if config.compare_sft_samples:
        compare_sft(stage, source)
        curves["more off-policy data"] = curve(
            stage.dir / "more", lambda row: copied(student, strong, row)
        )
    results["curves"] = {
        "distillation_flops": {"xlabel": "FLOPs", "ylabel": "thinking accuracy", "series": curves}
    }
    stage.finish(engine, results)


# -- the student and its teacher -----------------------------------------------------------------


def teacher_folder(stage: Stage) -> Path:
    folder = Path(stage.config.teacher) if stage.config.teacher else stage.latest(model="model")
    if folder is None or not (folder / "config.json").exists():
        raise UserError(
            f"stages.{stage.name}.teacher={folder}: no checkpoint there; run a stage of the model "
            "before, or name a Hugging Face folder"
        )
    theirs = Tokenizer(folder) if (folder / "tokenizer.json").exists() else stage.tokenizer
    if theirs.digest() != stage.tokenizer.digest():
        raise UserError(
            f"stages.{stage.name}.teacher={folder}: its tokenizer gives other ids than "
            f"{stage.tokenizer.path}'s; teacher and student must share one"
        )
    return folder


Teacher = Engine | TeacherClient | ServedTeacher


@contextmanager
def teacher_of(stage: Stage, rows: int) -> Iterator[Teacher]:
    """The teacher, here or elsewhere, of a student whose lm_head has so many rows."""
    config = stage.config
    if config.teacher_at is None:
        yield stage.engine(teacher_folder(stage), rows=rows)
    elif config.teacher_serves:
        yield served_teacher(stage)
    else:
        key = key_of("teacher_key_env", config.teacher_key_env).encode()
        how = {"key": key, "timeout": config.teacher_timeout}
        with TeacherClient(
            config.teacher_at, vocab=stage.tokenizer.vocab_size, rows=rows,
            tokenizer=stage.tokenizer.digest(), **how,
        ) as teacher:  # fmt: skip
            yield teacher


def served_teacher(stage: Stage) -> ServedTeacher:
    config = stage.config
    return ServedTeacher(
        config.teacher_at, stage.tokenizer, stage.shape(stage.recipe.model),
        timeout=config.teacher_timeout, key_env=config.teacher_key_env,
    )  # fmt: skip


def student_base(stage: Stage) -> Path:
    """The student to start from: named, trained before, or pre-trained here on the mixture."""
    config = stage.config
    if config.init or stage.latest(model="student"):
        return stage.start()
    settings, folder = config.student_pretraining, stage.data / "student_base"
    if settings is None or stage.recipe.student is None:
        raise UserError(
            f"stages.{stage.name}: the student starts from nothing; give init (a Hugging Face "
            "folder) or student_pretraining"
        )
    if not stage.prepared("student_base/DONE"):
        shape = stage.shape(stage.recipe.student)
        optimizer = {
            "kind": "muon", "lr": config.student_lr, "adam_lr": config.student_lr / 5,
            "min_lr": config.student_lr / 10, "decay": "linear",
        }  # fmt: skip
        engine = stage.engine(None, shape=shape, steps=settings.steps, **optimizer)
        pretrain.learn(stage, engine, settings, part="student")
        stage.save_hf(engine, folder)
        if stage.leads:
            (folder / "DONE").touch()
        stage.barrier()
    return folder


def problems(stage: Stage, n: int, purpose: str) -> list[tuple[Problem, Mode]]:
    """n training-side problems of all domains, each with the mode that its flag asks for."""
    rng = random.Random(stage.seed(purpose))
    pool = stage.problems(-(-n // len(stage.pool.domains)), purpose)
    rng.shuffle(pool)
    return [(p, "no_think" if rng.random() < NO_THINK else "think") for p in pool[:n]]


def teacher_samples(stage: Stage, n: int, purpose: str) -> list[Sample]:
    """The teacher's answers to n problems in both modes, as it gave them."""
    if stage.config.teacher_serves:
        sampler: Sampler = served_teacher(stage)
    else:
        sampler = stage.sampler(stage.engine(teacher_folder(stage)))
    out = []
    asked = problems(stage, n, purpose)
    params = SamplingParams(stage.config.max_tokens, 0.6, seed=stage.seed(purpose, "sample"))
    for mode in ("think", "no_think"):
        queries = [p for p, m in asked if m == mode]
        for (answer,) in evaluate.answers(sampler, stage.tokenizer, queries, params, mode):
            if answer.completion.finish_reason == "stop":
                out.append(chat_sample(stage.tokenizer, flagged(answer.problem, mode), answer.text))
    return out


def own_answers(stage: Stage, sampler: Any, step: int) -> list[Sample]:
    """The student's answers to this step's prompts: every token it chose carries the loss."""
    asked = problems(stage, stage.config.prompts, f"step {step}")
    rank, size = parallel.data_rank(), parallel.data_size()
    prompts = [
        stage.tokenizer.encode(render(flagged(p, mode), add_generation_prompt=True))
        for p, mode in asked[rank::size]
    ]
    params = SamplingParams(stage.config.max_tokens, seed=stage.seed("rollout", step, rank))
    samples = []
    for prompt, (c,) in zip(prompts, sampler.generate(prompts, params), strict=True):
        weights = [0.0] * len(prompt) + [float(m) for m in c.mask]
        samples.append(Sample(prompt + c.tokens, weights))
    return parallel.gather_over_data(samples)


Teaching = tuple[LossFn, Callable[[list[Batch]], None]]  # a loss, and what it needs in a batch


def taught_by(teacher: Teacher, config: DistillOnPolicy) -> Teaching:
    if isinstance(teacher, TeacherClient):
        return hidden_of_job(teacher, config)
    if isinstance(teacher, ServedTeacher) or config.teacher_topk:
        return topk_of_teacher(teacher, config)
    return hidden_of_teacher(teacher, config)


def hidden_of_teacher(teacher: Engine, config: DistillOnPolicy) -> Teaching:
    """The teacher's hidden states join the batch, its lm_head the loss: the whole distribution
    without a logit of it in memory."""

    def prepare(batches: list[Batch]) -> None:
        hidden = teacher.evaluate(batches, lambda head, _: head.hidden.cpu())
        for batch, states in zip(batches, hidden, strict=True):
            batch.columns["teacher_hidden"] = states

    loss = distillation(head_weight(teacher), config.divergence, config.temperature)
    return loss, prepare


def hidden_of_job(teacher: TeacherClient, config: DistillOnPolicy) -> Teaching:
    """The same of a teacher in another job, whose states come when a micro-batch's loss is due."""
    exact = distillation(teacher.weight, config.divergence, config.temperature)

    def loss(head: Head, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        states = teacher.states(batch.columns["teacher_row"])
        return exact(head, replace(batch, columns={"teacher_hidden": states}))

    return loss, teacher.ask


def topk_of_teacher(teacher: Engine | ServedTeacher, config: DistillOnPolicy) -> Teaching:
    """The teacher's best tokens join the batch."""

    def prepare(batches: list[Batch]) -> None:
        found = best_of(teacher, batches, config.teacher_topk, config.temperature)
        for batch, (ids, logprobs) in zip(batches, found, strict=True):
            batch.columns |= {"teacher_ids": ids.float(), "teacher_logprobs": logprobs}

    return distillation_topk(config.divergence, config.temperature), prepare


def best_of(
    teacher: Engine | ServedTeacher, batches: list[Batch], k: int, temperature: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """See `top_logprobs`; a server's temperature is 1."""
    if isinstance(teacher, ServedTeacher):
        return teacher.top_logprobs(batches, k)
    return top_logprobs(teacher, batches, k, temperature)


def keep_topk(stage: Stage, samples: list[Sample]) -> None:
    """data/topk: the teacher's best tokens at every position of its samples, once."""
    folder, k = stage.data / "topk", stage.config.teacher_topk
    if stage.prepared("topk/topk.json"):
        return
    teacher: Engine | ServedTeacher
    if stage.config.teacher_serves:
        teacher = served_teacher(stage)
    else:
        teacher = stage.engine(teacher_folder(stage))
    rank, size = parallel.data_rank(), parallel.data_size()
    with ExitStack() as leader:
        vocabulary = teacher.shape.vocab
        writer = TopKWriter(folder, k=k, vocab_size=vocabulary) if stage.leads else None
        store = leader.enter_context(writer) if writer else None
        for first in range(0, len(samples), KEPT_AT_ONCE):
            part = list(enumerate(samples[first : first + KEPT_AT_ONCE]))[rank::size]
            found = best_of(teacher, [collate([sample]) for _, sample in part], k)
            own = [(i, *best) for (i, _), best in zip(part, found, strict=True)]
            for _, ids, logprobs in sorted(parallel.gather_over_data(own), key=itemgetter(0)):
                if store:
                    store.add(ids, logprobs)
    stage.barrier()


# -- the comparison of Table 21 ------------------------------------------------------------------


def forward(shape: Qwen3Shape, row: dict[str, float], prefix: str = "") -> float:
    """FLOPs of one forward pass over what a step's log line counts."""
    tokens = row[f"{prefix}tokens"]
    return shape.forward_flops(tokens, row[f"{prefix}pairs"] / tokens) if tokens else 0.0


def distilled(student: Qwen3Shape, teacher: Qwen3Shape, row: dict[str, float]) -> float:
    """Sampling is one forward of the student, training three, the teacher one of its own."""
    return 4 * forward(student, row) + forward(teacher, row)


def reinforced(student: Qwen3Shape, row: dict[str, float]) -> float:
    """Everything is sampled, what carries a signal is trained on."""
    return forward(student, row) + 3 * forward(student, row, "trained_")


def copied(student: Qwen3Shape, teacher: Qwen3Shape, row: dict[str, float]) -> float:
    """The teacher writes a sample once, the student trains on it."""
    return forward(teacher, row) + 3 * forward(student, row)


def watcher(stage: Stage, engine: Engine, log: Log, steps: int) -> Callable[[int], None]:
    """Thinking accuracy at the start and at a few steps of a run, into points.jsonl."""
    at = {round(steps * i / POINTS) for i in range(POINTS + 1)}
    held = stage.held_out()

    def watch(step: int) -> None:
        if step in at:
            params = SamplingParams(stage.answer_tokens, 0.6, seed=stage.seed("curve"))
            found = evaluate.answers(stage.sampler(engine), stage.tokenizer, held, params, "think")
            log.point(step, **evaluate.accuracy(found))

    return watch


def curve(folder: Path, cost: Callable[[dict[str, float]], float]) -> dict[str, list[float]]:
    """A run's points against what it had spent by then, from its own record."""
    spent = {0: 0.0}
    for row in whole_records(folder / "metrics.jsonl"):
        spent[row["step"]] = spent[row["step"] - 1] + cost(row)
    points = whole_records(folder / "points.jsonl")
    columns = {
        name: [p[key] for p in points]
        for name, key in (("y", "value"), ("low", "low"), ("high", "high"))
    }
    return {"x": [spent[p["step"]] for p in points], **columns}


def compare_rl(stage: Stage, source: Path) -> dict[str, Any]:
    """RL from the same start, on problems drawn and flagged as distillation's thinking prompts."""
    config = stage.config.compare_rl
    engine = stage.engine(
        source, steps=config.steps * config.updates, lr=stage.config.compare_rl_lr
    )
    pool = [
        replace(p, messages=tuple(flagged(p, mode)))
        for p, mode in problems(stage, 2000, "rl")
        if mode == "think"
    ]
    watch = watcher(stage, engine, stage.log(config.steps, "rl"), config.steps)
    reasoning_rl.learn(stage, engine, source, pool, config, part="rl", watch=watch)
    return pass_rates(stage, engine)


def compare_sft(stage: Stage, source: Path) -> None:
    """More off-policy data from the same start: the baseline that can undercut both."""
    config = stage.config
    samples = teacher_samples(stage, config.compare_sft_samples, "more")
    steps = steps_of(samples, config.prompts, 1)
    engine, log = stage.engine(source, steps=steps), stage.log(steps, "more")
    supervised.train(
        engine,
        epochs(samples, config.prompts, stage.seed("more order")),
        steps=steps,
        capacity=config.micro_batch_tokens,
        folder=stage.dir / "checkpoints" / "more",
        log=log,
        save_every=config.save_every,
        watch=watcher(stage, engine, log, steps),
    )


def pass_rates(stage: Stage, engine: Engine) -> dict[str, dict[str, float]]:
    """pass@1 and pass@8 in thinking mode at T=0.6, and accuracy without thinking."""
    params = SamplingParams(stage.answer_tokens, 0.6, n=TRIES, seed=stage.seed("eval"))
    sampler, held = stage.sampler(engine), stage.held_out()
    found = evaluate.answers(sampler, stage.tokenizer, held, params, "think")
    correct = [[a.correct for a in tries] for tries in found]
    return {
        "pass1": evaluate.accuracy(found),
        "pass8": evaluate.pass_at_k(correct, TRIES),
        "no_think_accuracy": evaluate.accuracy(
            evaluate.answers(sampler, stage.tokenizer, held, params, "no_think")
        ),
    }
