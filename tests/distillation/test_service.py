"""A teacher in a job of its own teaches what one in the student's process does."""

import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch
from helpers.distillation_student import STUDENT, VOCABULARY, learn
from helpers.tiny_models import LAYOUT, SHAPE

from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.distillation.service.client import TeacherClient
from q3mega.distillation.service.server import serve
from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.inference import serve_teacher
from q3mega.io import whole_records
from q3mega.model.config import dtype_of

pytestmark = pytest.mark.dist
HERE = Path(__file__).parent
TEACHERS = {
    "dense": SHAPE(tied=False, layers=4, hidden=64, vocab=VOCABULARY),
    "bf16": SHAPE(tied=True, vocab=VOCABULARY),
    "moe": SHAPE(tied=False, experts=4, topk=2, moe_ffn=32, vocab=VOCABULARY),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def taught(folder: Path, processes: int, *words: str, port: int = 0):
    """The address of a teacher's job, and its process; killed at the end if it is still there."""
    port = port or free_port()
    log = folder / f"log-{port}"
    launcher = [] if processes == 1 else ["torch.distributed.run", f"--nproc-per-node={processes}",
                                          f"--master-port={free_port()}", "-m"]  # fmt: skip
    command = [sys.executable, "-m", *launcher, "q3mega", "serve-teacher", str(folder),
               f"--port={port}", "--idle=120", *words]  # fmt: skip
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        until = time.monotonic() + 60
        while "teaching at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.1)
        yield f"tcp://127.0.0.1:{port}", process
    finally:
        process.terminate()  # a torchrun ends its ranks
        process.wait(30)


def made(shape, seed, dtype=torch.float32):
    engine = Engine(shape, LAYOUT(), seed=seed, dtype=dtype)
    for parameter in engine.chunks[0].parameters():  # away from uniform
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name): a teacher's, with a tokenizer and the student that starts beside it."""
    base = tmp_path_factory.mktemp("teachers")

    def make(name):
        path = base / name
        if not path.exists():
            train_tokenizer(["a"], 265, path)
            dtype = torch.bfloat16 if name == "bf16" else torch.float32
            made(TEACHERS[name], 2, dtype).save_hf(path, {})
            made(STUDENT, 1).save_hf(path / "student", {})
        return path

    return make


def in_process(folder, name):
    teacher = Engine(TEACHERS[name], LAYOUT(), seed=0, dtype=dtype_of(folder))
    teacher.load_hf(folder)
    return learn(teacher, LAYOUT(), folder / "student")


def close(found, expected):
    # a KL is a difference of log-probabilities, some 6 nats here, in fp32
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=2e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dense", ["tensor=2"]),
        ("dense", ["pipeline=2"]),
        ("dense", ["context=2"]),
        ("moe", ["expert=2"]),
    ],
)
def test_two_jobs_of_different_layouts_are_one(folder, torchrun, name, words):
    path = folder(name)
    layouts = [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"context": 2}]
    with taught(path, 2, *words) as (at, _):
        cases = [[layout, at, str(path)] for layout in layouts]  # one student after another
        runs = torchrun("distillation_student.py", 2, json.dumps(cases))
    expected = in_process(path, name)
    assert expected[0][-1] < 0.9 * expected[0][0]  # it learns
    for each in runs:
        close(each, expected)


def test_a_bf16_teacher_sends_what_it_has(folder):
    path = folder("bf16")
    expected = in_process(path, "bf16")
    with (
        taught(path, 1) as (at, _),
        TeacherClient(at, vocab=VOCABULARY, tokenizer=Tokenizer(path).digest()) as teacher,
    ):
        assert teacher.weight.dtype == torch.bfloat16
        assert learn(teacher, LAYOUT(), path / "student") == expected


def test_what_does_not_fit_is_refused_before_anything_is_computed(folder, monkeypatch):
    path = folder("dense")
    Engine(STUDENT, LAYOUT(), seed=0)  # the process groups
    digest = Tokenizer(path).digest()
    monkeypatch.setenv("TEACHER_KEY", "open sesame")
    with taught(path, 1, "--key-env=TEACHER_KEY") as (at, _):
        key = b"open sesame"

        def come(**how):
            given = {"vocab": VOCABULARY, "tokenizer": digest, "key": key, "timeout": 20.0} | how
            with TeacherClient(at, **given) as teacher:
                return teacher.weight

        with pytest.raises(UserError, match="lm_head has 272 rows, the student's 300"):
            come(vocab=300)
        with pytest.raises(UserError, match="its tokenizer gives other ids"):
            come(tokenizer="0" * 64)
        with pytest.raises(UserError, match=r"no teacher takes this student.*same key"):
            come(key=b"guess")
        weight = come()  # and still takes who fits
        teacher = Engine(TEACHERS["dense"], LAYOUT(), seed=0)
        teacher.load_hf(path)
        assert weight.equal(teacher.chunks[0].output_layer.weight)
        for rows in (265, 300):  # a student of other padding
            held = come(vocab=265, rows=rows)
            assert held[:265].equal(weight[:265]) and len(held) == rows
    with pytest.raises(
        UserError, match=r"no teacher takes this student .*refused.*q3mega serve-teacher"
    ):
        come()


def test_a_network_needs_a_key(folder):
    with pytest.raises(UserError, match=r"--network .* --key-env"):
        serve_teacher(folder("dense"), LAYOUT(), 0, network=True, key_env=None, idle=1.0)
    with pytest.raises(UserError, match="--key-env=NOT_THERE: the environment has no such"):
        serve_teacher(folder("dense"), LAYOUT(), 0, network=True, key_env="NOT_THERE", idle=1.0)


def test_a_teacher_that_nobody_asks_ends(folder):
    path = folder("dense")
    engine = Engine(TEACHERS["dense"], LAYOUT(), seed=0)
    started = time.monotonic()
    serve(engine, Tokenizer(path).digest(), port=0, key=b"", network=False, idle=0.3)
    assert 0.3 <= time.monotonic() - started < 10


@pytest.mark.slow
def test_a_teacher_that_dies_is_named_and_the_next_run_goes_on(folder, tmp_path):
    path, port = folder("dense"), free_port()
    Engine(STUDENT, LAYOUT(), seed=0)  # the process groups
    digest = Tokenizer(path).digest()

    def run(at, where, watch=None):
        with TeacherClient(at, vocab=VOCABULARY, tokenizer=digest, timeout=30.0) as teacher:
            return learn(teacher, LAYOUT(), path / "student", tmp_path / where, watch)

    for where in ("uncut", "cut"):
        (tmp_path / where).mkdir()
    with taught(path, 1, port=port) as (at, process):
        uncut = run(at, "uncut")

        def kill(step):
            if step == 2:
                process.kill()
                process.wait()

        lost = f"teacher_url={at}: the teacher is gone .*start `q3mega serve-teacher` again"
        with pytest.raises(UserError, match=lost):
            run(at, "cut", kill)
    steps = [row["step"] for row in whole_records(tmp_path / "cut" / "metrics.jsonl")]
    assert steps == [1, 2]
    with taught(path, 1, port=port) as (at, _):
        told = []
        assert run(at, "cut", told.append) == uncut
    assert told == [3]  # from the checkpoint of the step before
