"""The teacher of a distillation, its samples, and what its student is evaluated on."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from q3mega.config.secrets import key_of
from q3mega.config.stages import DistillOffPolicy, DistillOnPolicy
from q3mega.data.batch import Sample, collate
from q3mega.data.sft import chat_sample
from q3mega.data.tokenizer import Tokenizer
from q3mega.distillation.served_teacher import ServedTeacher
from q3mega.distillation.service.client import TeacherClient
from q3mega.distillation.teaching import Teacher, best_of
from q3mega.distillation.topk import TopKWriter
from q3mega.engine import Engine, parallel
from q3mega.errors import UserError
from q3mega.evaluation import answers, intervals
from q3mega.evaluation.answers import Mode, flagged
from q3mega.problems import Problem
from q3mega.rollout import Sampler, SamplingParams
from q3mega.stages.common.stage import Stage

KEPT_AT_ONCE = 64  # samples whose top-k is in memory
NO_THINK = 0.25  # of the prompts ask for the non-thinking mode
TRIES = 8  # answers a problem, for pass@8
Distillation = Stage[DistillOffPolicy] | Stage[DistillOnPolicy]


def teacher_folder(stage: Distillation) -> Path:
    """The teacher's weights; UserError for none, and for another tokenizer."""
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


@contextmanager
def teacher_of(stage: Distillation, rows: int) -> Iterator[Teacher]:
    """The teacher, here or elsewhere, of a student whose lm_head has so many rows."""
    config = stage.config
    if config.teacher_url is None:
        yield stage.engine(teacher_folder(stage), rows=rows)
    elif config.teacher_serves:
        yield served_teacher(stage)
    else:
        key = key_of("teacher_key_env", config.teacher_key_env).encode()
        with TeacherClient(
            config.teacher_url, vocab=stage.tokenizer.vocab_size, rows=rows,
            tokenizer=stage.tokenizer.digest(), key=key, timeout=config.teacher_timeout_s,
        ) as teacher:  # fmt: skip
            yield teacher


def served_teacher(stage: Distillation) -> ServedTeacher:
    """The recipe's server as a teacher."""
    config = stage.config
    assert config.teacher_url is not None  # who asks for one has looked
    return ServedTeacher(
        config.teacher_url, stage.tokenizer, stage.shape(stage.recipe.model),
        timeout=config.teacher_timeout_s, key_env=config.teacher_key_env,
    )  # fmt: skip


def problems(stage: Distillation, n: int, purpose: str) -> list[tuple[Problem, Mode]]:
    """n training-side problems of all domains, each with the mode that its flag asks for."""
    rng = random.Random(stage.seed(purpose))
    pool = stage.problems(-(-n // len(stage.pool.domains)), purpose)
    rng.shuffle(pool)
    return [(p, "no_think" if rng.random() < NO_THINK else "think") for p in pool[:n]]


def teacher_samples(stage: Distillation, n: int, purpose: str) -> list[Sample]:
    """The teacher's answers to n problems in both modes, as it gave them."""
    if stage.config.teacher_serves:
        sampler: Sampler = served_teacher(stage)
    else:
        sampler = stage.sampler(stage.engine(teacher_folder(stage)))
    out = []
    drawn = problems(stage, n, purpose)
    params = SamplingParams(stage.config.max_tokens, 0.6, seed=stage.seed(purpose, "sample"))
    for mode in ("think", "no_think"):
        queries = [p for p, m in drawn if m == mode]
        for (answer,) in answers.answer_problems(sampler, stage.tokenizer, queries, params, mode):
            if answer.completion.finish_reason == "stop":
                out.append(chat_sample(stage.tokenizer, flagged(answer.problem, mode), answer.text))
    return out


def keep_topk(stage: Distillation, samples: list[Sample]) -> None:
    """data/topk: the teacher's best tokens at every position of its samples, once."""
    folder, k = stage.data / "topk", stage.config.teacher_topk
    if stage.prepared("topk/topk.json"):
        return
    teacher: Engine | ServedTeacher
    if stage.config.teacher_serves:
        teacher = served_teacher(stage)
    else:
        teacher = stage.engine(teacher_folder(stage))

    def best_tokens(share: list[Sample]) -> list[tuple[Tensor, Tensor]]:
        return best_of(teacher, [collate([sample]) for sample in share], k)

    with ExitStack() as leader:
        vocabulary = teacher.shape.vocab
        writer = TopKWriter(folder, k=k, vocab_size=vocabulary) if stage.leads else None
        store = leader.enter_context(writer) if writer else None
        for first in range(0, len(samples), KEPT_AT_ONCE):
            part = samples[first : first + KEPT_AT_ONCE]
            for ids, logprobs in parallel.map_over_data_ranks(part, best_tokens):
                if store:
                    store.add(ids, logprobs)
    stage.barrier()


def pass_rates(stage: Distillation, engine: Engine) -> dict[str, dict[str, float]]:
    """pass@1 and pass@8 in thinking mode at T=0.6, and accuracy without thinking."""
    params = SamplingParams(stage.answer_tokens, 0.6, n=TRIES, seed=stage.seed("eval"))
    sampler, held = stage.sampler(engine), stage.held_out()
    answered = answers.answer_problems(sampler, stage.tokenizer, held, params, "think")
    correct = [[a.correct for a in tries] for tries in answered]
    return {
        "pass1": answers.accuracy(answered),
        "pass8": intervals.pass_at_k(correct, TRIES),
        "no_think_accuracy": answers.accuracy(
            answers.answer_problems(sampler, stage.tokenizer, held, params, "no_think")
        ),
    }
