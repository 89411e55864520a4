"""Run under torchrun: a student of a teacher in another job, under each layout of a JSON list.

`torchrun distillation_student.py CASES`, a case: [layout, the teacher's address, the folder of its
tokenizer].
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from q3mega import device  # noqa: F401

# isort: split
import torch.distributed as dist

from helpers.tiny_models import LAYOUT, SHAPE, documents, run_cases, weights
from q3mega.data.tokenizer import Tokenizer
from q3mega.distillation.service.client import TeacherClient
from q3mega.engine import Engine, OptimizerSpec
from q3mega.engine.parallel import initialise
from q3mega.io import whole_records
from q3mega.stages.distill import taught_by
from q3mega.train import supervised
from q3mega.train.log import Log

VOCABULARY = 272  # rows of the lm_heads: more than the tokenizer's ids
STUDENT = SHAPE(tied=True, vocab=VOCABULARY)
CONFIG = SimpleNamespace(divergence="reverse_kl", temperature=2.0, teacher_topk=0)
STEPS = 3


def learn(teacher, layout, start, folder=None, watch=None):
    """[losses by step, the weights' norms after it] of a student from the folder `start`.

    folder: where its checkpoints are, for one that is cut; None: anywhere.
    """
    engine = Engine(STUDENT, layout, seed=0, optimizer=OptimizerSpec(lr=0.01, steps=STEPS))
    engine.load_hf(start)
    loss, prepare = taught_by(teacher, CONFIG)
    if folder is None:
        box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        folder = Path(box[0])
    try:
        supervised.train(
            engine, lambda step: documents(step), steps=STEPS, capacity=64, folder=folder / "saved",
            log=Log(folder, STEPS), save_every=1, loss_fn=loss, prepare=prepare, watch=watch,
        )  # fmt: skip
    finally:
        engine.finish_saving()  # a process would have ended here, and its thread with it
    dist.barrier()
    return [[row["loss"] for row in whole_records(folder / "metrics.jsonl")], weights(engine)]


def case(layout, at, folder):
    layout = LAYOUT(**{"processes": 2} | layout)
    initialise(layout, 0)
    digest = Tokenizer(folder).digest()
    with TeacherClient(at, vocab=VOCABULARY, tokenizer=digest, timeout=60.0) as teacher:
        return learn(teacher, layout, Path(folder) / "student")


if __name__ == "__main__":
    run_cases(case, sys.argv[1])
