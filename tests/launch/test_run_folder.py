"""What a run is: what may change between two starts, and what refuses the next one."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from q3mega.cli import main
from q3mega.config.recipe import Recipe
from q3mega.config.section import Change
from q3mega.errors import UserError
from q3mega.io import exclusive_lock
from q3mega.launch import driver
from q3mega.launch.run_folder import changes, compare, keep

TINY = Path(__file__).parents[1] / "helpers" / "tiny.yaml"
ENGINE = "{{kind: vllm, urls: [{url}], timeout_s: {timeout}}}"


def begun(run_dir: Path, *overrides: str) -> Recipe:
    """A folder in which the first stage has left something."""
    recipe = Recipe.load(TINY, overrides)
    keep(recipe, run_dir)
    folder = recipe.stage_dir(run_dir, "pretrain_general")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    return recipe


@pytest.mark.parametrize(
    ("before", "now", "mark"),
    [
        ("name=a", "name=b", Change.NOTHING),
        ("slurm.time=1:00:00", "slurm.time=2:00:00", Change.NOTHING),
        ("cold_start.save_every=1", "cold_start.save_every=2", Change.NOTHING),
        (
            "reasoning_rl.rollout_servers=" + ENGINE.format(url="http://a", timeout=1),
            "reasoning_rl.rollout_servers=" + ENGINE.format(url="http://b", timeout=2),
            Change.NOTHING,
        ),
        (
            "general_rl.judge_model={url: 'http://a', model: m, key_env: A}",
            "general_rl.judge_model={url: 'http://b', model: m, concurrency: 3}",
            Change.NOTHING,
        ),
        ("general_rl.judge_model={url: 'http://a', model: m}", "general_rl.judge_model=null", None),
        (
            "general_rl.judge_model={url: 'http://a', model: m}",
            "general_rl.judge_model={url: 'http://a', model: n}",
            None,
        ),
        (
            "distill_on_policy.teacher_url=null",
            "distill_on_policy={teacher_url: 'tcp://a:1', compare_sft_samples: 0}",
            None,
        ),
        ("cold_start.layout.processes=1", "cold_start.layout.processes=2", Change.ROUNDING),
        ("micro_batch", "cold_start.micro_batch_tokens=100", Change.ROUNDING),
        ("seed=1", "seed=2", None),
        ("cold_start.lr=1", "cold_start.lr=2", None),
        ("cold_start.init=a", "cold_start.init=b", None),
    ],
)
def test_what_a_field_is_to_a_result(before: str, now: str, mark: Change | None) -> None:
    def load(word: str) -> Recipe:
        raw = yaml.safe_load(TINY.read_text())
        section, _, value = word.partition("=")
        if value.startswith("{") and section == "distill_on_policy":
            stage = raw["stages"][section] | yaml.safe_load(value)
            return Recipe.load(TINY, [f"{section}={json.dumps(stage)}"])
        return Recipe.load(TINY, [word] if value else [])

    changed = changes(load(before), load(now))
    assert (None in changed) == (mark is None)
    if mark:
        assert mark in changed


def test_a_changed_run_goes_on_and_keeps_what_it_was(tmp_path: Path) -> None:
    before = begun(tmp_path)
    now = Recipe.load(TINY, ["layout.processes=1", "slurm.partition=x"])
    rounding, free = keep(now, tmp_path)
    assert "layout.processes (2 -> 1)" in rounding and "low bits" in rounding
    assert "slurm.partition (None -> x)" in free
    assert Recipe.load(tmp_path / "recipe.yaml") == now
    assert Recipe.load(tmp_path / "recipe.1.yaml") == before
    assert keep(now, tmp_path) == [] and not (tmp_path / "recipe.2.yaml").exists()
    with pytest.raises(UserError, match=r"seed \(1 -> 5\); choose another --run-dir"):
        compare(Recipe.load(TINY, ["seed=5"]), tmp_path)


def test_a_recipe_with_which_nothing_was_computed_binds_nobody(tmp_path: Path) -> None:
    keep(Recipe.load(TINY), tmp_path)
    other = Recipe.load(TINY, ["seed=5"])
    folder = other.stage_dir(tmp_path, "pretrain_general")
    folder.mkdir()
    (folder / "log.txt").write_text("error: no such file")
    keep(other, tmp_path)
    assert Recipe.load(tmp_path / "recipe.yaml").seed == 5


@pytest.mark.parametrize("command", ["run", "slurm"])
def test_a_start_that_fails_its_checks_leaves_nothing(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(TINY), "--run-dir", str(tmp_path / "run"), f"rewards=[{tmp_path}/none.py]"]
    assert main([command, *words]) == 2
    assert "none.py" in capsys.readouterr().err
    assert main(["plan", str(TINY), f"rewards=[{tmp_path}/none.py]"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MIN_FREE_BYTES", 2**60)
    with pytest.raises(UserError, match="free disk"):
        driver.run(Recipe.load(TINY), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)  # as some network file systems answer
    path, holder = tmp_path / ".lock", tmp_path / ".lock.holder"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with exclusive_lock(path, ""):
        assert holder.read_text().split()[0] == str(os.getpid())
        holder.write_text(f"{other.pid} {os.uname().nodename}")
        with pytest.raises(UserError, match=f"by {other.pid}; if .* remove .*holder"):
            exclusive_lock(path, "by {holder}").__enter__()
    holder.write_text(f"{other.pid} {os.uname().nodename}")
    other.communicate(b"\n")  # a process of this machine that is no more
    with exclusive_lock(path, ""):
        pass
    holder.write_text("1 elsewhere 77")
    with pytest.raises(UserError, match="by 1 on elsewhere, SLURM job 77; "):
        exclusive_lock(path, "by {holder}").__enter__()
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # this very job, before its node was lost
    with exclusive_lock(path, ""):
        pass
    assert not holder.exists()


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("cold_start.init={}/none", "stages.cold_start.init="),
        ("distill_on_policy.teacher={}/none", "stages.distill_on_policy.teacher="),
        ("tokenizer={{path: '{}/none'}}", "tokenizer.path="),
    ],
)
def test_folders_are_looked_for_before_anything_is_written(
    override: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(TINY), override.format(tmp_path)]
    for command in (["run"], ["slurm"], ["plan"]):
        where = [] if command == ["plan"] else ["--run-dir", str(tmp_path / "run")]
        assert main([*command, *words, *where]) == 2
        assert field in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
