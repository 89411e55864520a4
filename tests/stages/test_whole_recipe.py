"""All nine stages at toy size: what they leave, and that kills change nothing of it."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from q3mega.cli import main
from q3mega.config.recipe import Recipe
from q3mega.config.stages import STAGES
from q3mega.data.batch import Sample, collate
from q3mega.inference import Checkpoint
from q3mega.problems.generated.general import GENERAL
from q3mega.problems.generated.reasoning import REASONING
from q3mega.problems.pool import Pool
from q3mega.rewards import MODELS, TASK_REWARD
from q3mega.rollout import SamplingParams
from q3mega.train.ledger import FILE, Ledger

RECIPE = Path(__file__).parents[1] / "helpers" / "tiny.yaml"
KILLS = 5
STEPS = "drawn", "without a held-out question", "of these, different ones"
pytestmark = [pytest.mark.slow, pytest.mark.dist]


def start(run_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "q3mega", "run", str(RECIPE), "--run-dir", str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def finish(run_dir: Path) -> str:
    process = start(run_dir)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def uncut(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uncut")
    finish(run_dir)
    return run_dir


def rows_of(ledger: Path) -> list[tuple]:
    with sqlite3.connect(ledger) as connection:
        return connection.execute("SELECT * FROM rollouts ORDER BY step, position").fetchall()


def folders(run_dir: Path) -> dict[str, Path]:
    recipe = Recipe.load(RECIPE)
    return {name: recipe.stage_dir(run_dir, name) for name in recipe.stages}


def test_every_stage_leaves_its_record(uncut):
    assert list(folders(uncut)) == list(STAGES)
    for name, folder in folders(uncut).items():
        assert (folder / "DONE").exists()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows] == list(range(1, rows[0]["total"] + 1)), name
        for metric, found in json.loads((folder / "eval.json").read_text()).items():
            if "low" in found:
                assert found["low"] <= found["value"] <= found["high"], (name, metric)
    assert (uncut / "report.html").stat().st_size > 10_000
    results = json.loads((uncut / "results.json").read_text())
    assert set(results) == set(STAGES)


def test_curation_says_what_it_dropped(uncut):
    for name in ("cold_start", "reasoning_rl", "mode_fusion"):
        drops = json.loads((folders(uncut)[name] / "data" / "drops.json").read_text())
        assert sum(drops.values()) > 0, name
    for name in ("pretrain_general", "pretrain_reasoning", "pretrain_long"):
        steps = json.loads((folders(uncut)[name] / "data" / "filter_report.json").read_text())
        for kind in Recipe.load(RECIPE).stages[name].mixture:
            drawn, clean, different = (steps[f"{kind}: {step}"] for step in STEPS)
            assert drawn == clean >= different > 0, (name, kind)
    queries = json.loads((folders(uncut)["cold_start"] / "data" / "queries.json").read_text())
    problems = json.loads((folders(uncut)["reasoning_rl"] / "data" / "problems.json").read_text())
    assert not {q["id"] for q in queries} & {p["id"] for p in problems}  # rule 1 of the selection


def test_the_audit_of_the_rewards_covers_every_task_and_finds_no_rule_to_cheat(uncut):
    audit = json.loads((folders(uncut)["general_rl"] / "data" / "audit.json").read_text())
    assert set(audit) == {*REASONING, *GENERAL}
    assert all(row["probes"] >= 75 for row in audit.values())
    assert {task for task, row in audit.items() if row["highest"] > 0} <= {
        task for task, names in TASK_REWARD.items() if names in MODELS
    }


@pytest.mark.parametrize("stage", STAGES)
def test_transformers_reads_in_what_a_stage_leaves_the_engines_model(uncut, stage):
    folder = folders(uncut)[stage] / "hf"
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    sampler = Checkpoint(folder).sampler
    chats = [p.messages for p in Pool().held_out(6)]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True) for c in chats]
    prompts = [p["input_ids"] if hasattr(p, "keys") else p for p in prompts]
    greedy = sampler.generate(prompts, SamplingParams(24, temperature=0.0))
    for prompt, (completion,) in zip(prompts, greedy, strict=True):
        tokens = prompt + completion.tokens
        batch = collate([Sample(tokens, [0.0] * len(tokens))])
        [ours] = sampler.engine.evaluate([batch], lambda head, _: head.hidden @ head.weight.T)
        logits = theirs(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits, ours, rtol=0, atol=1e-4)
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
            eos_token_id=[sampler.tokenizer.eos, sampler.tokenizer.eod],
        )  # fmt: skip
        assert out[0, len(prompt) :].tolist() == completion.tokens


def test_eval_takes_problems_of_ones_own(uncut, tmp_path, capsys):
    folder, file = folders(uncut)["general_rl"] / "hf", tmp_path / "mine.jsonl"
    row = {"question": "What is 5-1+3?", "reward": "length"}  # 1 for a short answer
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"reward": ["length", "answered"]}))
    command = ["eval", str(folder), "--mode", "no_think", "--max-tokens", "40", "--tries", "2"]
    assert main([*command, "--tasks", str(file)]) == 0
    _, mean, best = (line.split() for line in capsys.readouterr().out.splitlines())
    assert mean[:2] == [str(file), "score"] and best[:2] == [str(file), "pass@2"]
    assert 0 <= float(mean[2]) <= 1 and mean[-1] == best[-1] == "2"
    file.write_text(json.dumps(row | {"reward": "code"}))
    assert main([*command, "--tasks", str(file)]) == 2
    error = capsys.readouterr().err
    assert "row 1: reward=code" in error and f"{file}:1" in error and "tests is missing" in error


def test_reasoning_rl_takes_a_preset_a_schedule_and_a_correction(uncut, tmp_path):
    start = folders(uncut)["cold_start"] / "hf"
    words = {
        "init": start,
        "preset": "grpo",
        "schedule": "one_step_off",
        "rollout_correction": "tis",
    }
    tokenizer = f"tokenizer.path={start}", "tokenizer.vocab_size=null"
    given = [*tokenizer, *(f"reasoning_rl.{name}={word}" for name, word in words.items())]
    command = ["run", str(RECIPE), "--run-dir", str(tmp_path), "--only", "reasoning_rl", *given]
    assert main(command) == 0
    [folder] = tmp_path.glob("*-reasoning_rl")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kept_fraction"]]
    assert trained and all(row["logprob_mismatch"] < 0.1 and row["kl"] >= 0 for row in trained)
    balance = Ledger(folder / FILE, writes=False).balance()
    assert (balance.drawn, balance.pending) == (3 * 8 * 4, 0) and balance.used > 0
    assert "Ledger of the rollouts" in (tmp_path / "report.html").read_text()


def made(folder):
    """All that is in a folder, from which others may be taking files at this moment."""
    return {
        Path(place, name).relative_to(folder)
        for place, within, files in os.walk(folder)
        for name in (*within, *files)
    }


def test_kills_change_nothing(uncut, tmp_path):
    """Kills at moments that are drawn from the files that a run makes, not from the clock: none is
    spent on imports, however busy the machine, and every stage's part is as long as its work."""
    rng = random.Random(0)
    total, seen, kills = len(made(uncut)), set(), 0
    for part in range(KILLS):
        moment = rng.uniform(part, part + 1) * total / KILLS
        process = start(tmp_path)
        before = len(seen)
        while process.poll() is None and len(seen) <= max(moment, before):
            time.sleep(0.05)
            seen |= made(tmp_path)
        time.sleep(rng.uniform(0, 1))  # into the work between two files
        tree = [process.pid, *(p.pid for p in children(process.pid))]
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == KILLS, "the run had ended before"
    finish(tmp_path)
    for name, folder in folders(tmp_path).items():
        expected = (folders(uncut)[name] / "hf" / "model.safetensors").read_bytes()
        assert (folder / "hf" / "model.safetensors").read_bytes() == expected, name
        metrics = [
            [
                {k: v for k, v in json.loads(line).items() if k != "seconds"}
                for line in (f / "metrics.jsonl").read_text().splitlines()
            ]
            for f in (folder, folders(uncut)[name])
        ]
        assert metrics[0] == metrics[1], name
        for ledger in folders(uncut)[name].rglob(FILE):
            found = folder / ledger.relative_to(folders(uncut)[name])
            assert rows_of(found) == rows_of(ledger), name
            balance = Ledger(found, writes=False).balance()
            assert balance.pending == 0 < balance.drawn
