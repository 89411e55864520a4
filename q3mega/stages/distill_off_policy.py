"""Stage 8, off-policy distillation: the student learns the teacher's answers in both modes.

A student without weights is pre-trained first. With `teacher_topk` it learns the teacher's best
tokens at each position of those answers (Qwen3 report, section 4.5).
"""

import json
from pathlib import Path

from q3mega.algorithms.losses import distillation_topk
from q3mega.config.stages import DistillOffPolicy
from q3mega.data.batch import Sample
from q3mega.distillation.topk import TeacherTopK, WithTeacher
from q3mega.errors import UserError
from q3mega.stages.common.fine_tune import fine_tune
from q3mega.stages.common.pretraining import pretrain
from q3mega.stages.common.stage import Stage
from q3mega.stages.common.teachers import keep_topk, pass_rates, teacher_samples


def run(stage: Stage[DistillOffPolicy]) -> None:
    """Collect the teacher's answers, train the student on them, evaluate."""
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


def student_base(stage: Stage[DistillOffPolicy]) -> Path:
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
        engine = stage.engine(
            None, shape=shape, steps=settings.steps, kind="muon", lr=config.student_lr,
            adam_lr=config.student_lr / 5, min_lr=config.student_lr / 10, decay="linear",
        )  # fmt: skip
        pretrain(stage, engine, settings, part="student")
        stage.save_hf(engine, folder)
        if stage.leads:
            (folder / "DONE").touch()
        stage.barrier()
    return folder
