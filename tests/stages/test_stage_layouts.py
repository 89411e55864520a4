"""Stages under layouts: the same evaluation, and what the death of one rank does."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT

from q3mega.config.recipe import Recipe
from q3mega.engine import Engine
from q3mega.launch.progress import recent_metrics

RECIPE = Path(__file__).parents[1] / "helpers" / "tiny.yaml"
SEQUENCE = "pretrain_general.layout.sequence_parallel=true"


def command(folder: Path, stage: str, *overrides: str) -> list[str]:
    run = [sys.executable, "-m", "q3mega", "run", str(RECIPE), "--run-dir", str(folder)]
    return [*run, "--only", stage, *overrides]


def run(folder: Path, stage: str, *overrides: str) -> dict[str, dict[str, float]]:
    done = subprocess.run(
        command(folder, stage, *overrides), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [path] = folder.glob(f"*-{stage}/eval.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.dist
def test_layouts_evaluate_alike(tmp_path: Path) -> None:
    given = "pretrain_general", "pretrain_general.steps=2", "model.kv_heads=2"
    model = Recipe.load(RECIPE, ["model.kv_heads=2"]).model
    # random weights would depend on where the layers are built
    Engine(model.shape(400), LAYOUT(), seed=3).save_hf(str(tmp_path / "start"), {})
    init = f"pretrain_general.init={tmp_path / 'start'}"
    found = {
        layout: run(tmp_path / layout.replace("=", "_"), *given, init, *words)
        for layout, words in {
            "data=2": [],
            "pipeline=2": ["pretrain_general.layout.pipeline=2"],
            "tensor=2": ["pretrain_general.layout.tensor=2", SEQUENCE],
            "context=2": ["pretrain_general.layout.context=2"],
        }.items()
    }
    expected = found.pop("data=2")
    for layout, results in found.items():
        assert results.keys() == expected.keys()
        for name, result in results.items():
            assert result["value"] == pytest.approx(expected[name]["value"], rel=1e-3), layout


@pytest.mark.slow
@pytest.mark.dist
def test_a_dead_rank_ends_the_stage_and_the_next_run_goes_on(tmp_path: Path) -> None:
    given = "pretrain_general", "layout.processes=4", "pretrain_general.layout.pipeline=2"
    short = "pretrain_general.steps=12", "pretrain_general.save_every=3"
    run(tmp_path / "uncut", *given, *short)
    cut = tmp_path / "cut"
    step, victim = random.randint(4, 11), random.randrange(4)  # there is a checkpoint
    process = subprocess.Popen(
        command(cut, *given, *short), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    records: list[dict[str, float]] = []
    while not records or records[-1]["step"] < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
        records = recent_metrics(cut / "01-pretrain_general")
    ranks = psutil.Process(process.pid).children()
    killed = next(r for r in ranks if r.environ()["RANK"] == str(victim))
    os.kill(killed.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)  # all of them, within a minute
    assert process.returncode == 1
    [line] = errors.splitlines()
    assert f"pretrain_general failed: rank {victim} was killed by SIGKILL" in line
    assert not any(r.is_running() for r in ranks)
    run(cut, *given, *short)
    before, after = (x / "01-pretrain_general" for x in (tmp_path / "uncut", cut))
    for file in (before / "eval.json", *(before / "hf").iterdir()):
        assert file.read_bytes() == (after / file.relative_to(before)).read_bytes(), file
