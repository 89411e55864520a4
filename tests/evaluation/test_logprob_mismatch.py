"""`q3mega logprob-mismatch --record` under one layout, `--against` it under another."""

import json
import re
import subprocess
import sys
from itertools import islice

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPE

from q3mega.cli import main
from q3mega.data import package_text
from q3mega.data.tokenizer import train_tokenizer
from q3mega.engine import Engine

SHAPES = {
    "dense": (SHAPE(tied=True, vocab=300), ["tensor=2", "sequence_parallel=true"]),
    "moe": (SHAPE(tied=False, vocab=300, experts=4, topk=2, moe_ffn=32), ["expert=2"]),
}


@pytest.fixture
def checkpoint(tmp_path):
    def make(kind):
        folder = tmp_path / "hf"
        Engine(SHAPES[kind][0], LAYOUT(), seed=3).save_hf(folder, {})
        train_tokenizer(islice(package_text.documents("stdlib"), 5), 300, folder)
        return folder

    return make


def printed(out):
    return {name.strip(): float(value) for name, value in re.findall(r"(.+?)\s{2,}(\S+)\n", out)}


@pytest.mark.dist
@pytest.mark.parametrize("kind", SHAPES)
def test_another_layout_is_rounding_apart_and_other_weights_are_not(
    checkpoint, kind, tmp_path, capsys
):
    folder, record = checkpoint(kind), tmp_path / "record.json"
    words = ["--problems", "6"]
    assert main(["logprob-mismatch", str(folder), *words, "--record", str(record)]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    command += ["q3mega", "logprob-mismatch", str(folder), *SHAPES[kind][1], *words]
    done = subprocess.run(
        [*command, "--against", str(record), "--threshold", "1e-5"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = printed(done.stdout)
    assert found["tokens"] > 100 and found["max |delta log p|"] < 1e-4
    assert found["top-1 flipped"] == 0
    assert ("routes that differ" in found) == (kind == "moe")

    kept = json.loads(record.read_text())
    kept["logprobs"][0][0] -= 0.5
    kept["best"][0][0] += 1
    record.write_text(json.dumps(kept))
    capsys.readouterr()
    assert (
        main(
            [
                "logprob-mismatch",
                str(folder),
                *words,
                "--against",
                str(record),
                "--threshold",
                "1e-5",
            ]
        )
        == 1
    )
    found = printed(capsys.readouterr().out)
    assert found["max |delta log p|"] == pytest.approx(0.5, rel=1e-3)
    assert found["top-1 flipped"] == pytest.approx(1 / found["tokens"], rel=1e-2)


def test_what_does_not_fit_is_said(checkpoint, tmp_path, capsys):
    folder, record = checkpoint("dense"), tmp_path / "record.json"
    assert main(["logprob-mismatch", str(folder), "--problems", "2", "--record", str(record)]) == 0
    assert main(["logprob-mismatch", str(folder), "--problems", "3", "--against", str(record)]) == 2
    assert "the two records are of other tokens" in capsys.readouterr().err
    record.write_text("{}")
    assert main(["logprob-mismatch", str(folder), "--problems", "2", "--against", str(record)]) == 2
    assert "is no record of logprob-mismatch --record" in capsys.readouterr().err
