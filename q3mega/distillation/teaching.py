"""A teacher as a loss, and as what that loss needs in a batch, wherever the teacher computes."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from q3mega.algorithms.losses import distillation, distillation_topk
from q3mega.config.stages import DistillOnPolicy
from q3mega.data.batch import Batch
from q3mega.distillation.served_teacher import ServedTeacher
from q3mega.distillation.service.client import TeacherClient
from q3mega.distillation.service.server import head_weight
from q3mega.engine import Engine, LMHead, LossFn
from q3mega.rollout.logprobs import top_logprobs

Teacher = Engine | TeacherClient | ServedTeacher
Teaching = tuple[LossFn, Callable[[list[Batch]], None]]  # a loss, and what it needs in a batch


def taught_by(teacher: Teacher, config: DistillOnPolicy) -> Teaching:
    """The loss of a teacher, and the function that adds to a batch what the loss needs."""
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

    def loss(head: LMHead, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        states = teacher.states(batch.columns["teacher_row"])
        return exact(head, replace(batch, columns={"teacher_hidden": states}))

    return loss, teacher.ask


def topk_of_teacher(teacher: Engine | ServedTeacher, config: DistillOnPolicy) -> Teaching:
    """The teacher's best tokens join the batch."""

    def prepare(batches: list[Batch]) -> None:
        candidates = best_of(teacher, batches, config.teacher_topk, config.temperature)
        for batch, (ids, logprobs) in zip(batches, candidates, strict=True):
            batch.columns |= {"teacher_ids": ids.float(), "teacher_logprobs": logprobs}

    return distillation_topk(config.divergence, config.temperature), prepare


def best_of(
    teacher: Engine | ServedTeacher, batches: list[Batch], k: int, temperature: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """See `top_logprobs`; a server's temperature is 1."""
    if isinstance(teacher, ServedTeacher):
        return teacher.top_logprobs(batches, k)
    return top_logprobs(teacher, batches, k, temperature)
