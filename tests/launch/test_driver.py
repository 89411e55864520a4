"""The driver and the command line, on real processes that stand in for the stages."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from q3mega import cli
from q3mega.config.recipe import Recipe
from q3mega.errors import UserError
from q3mega.launch import driver
from q3mega.launch.driver import StageFailed, run
from q3mega.launch.progress import recent_metrics
from q3mega.ops import dispatch

LAPTOP = yaml.safe_load(
    (Path(__file__).resolve().parents[2] / "examples" / "laptop.yaml").read_text()
)
STAGES: dict[str, dict[str, Any]] = {
    "pretrain_general": {"layout": {"processes": 2}},
    "cold_start": {"layout": {"processes": 1}, "lr": 0.001},
}
RECIPE = LAPTOP | {
    "seed": 7,
    "stages": {stage: LAPTOP["stages"][stage] | changes for stage, changes in STAGES.items()},
}

# Counts up in metrics.jsonl, ten steps a stage, and goes on where a cut run stopped. BEHAVE says
# in which way it goes wrong, and in which stage.
STAGE = """
import json, os, pathlib, signal, sys, time

run_dir, stage = pathlib.Path(sys.argv[1]), sys.argv[2]
folder = next(run_dir.glob("*-" + stage))
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
print("rank", rank, "of", world, "port", os.environ["MASTER_PORT"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
where, _, how = os.environ.get("BEHAVE", "").partition(":")
how = how if where == stage else ""
if how == "bad_input" and rank == world - 1:
    print("Traceback: noise", file=sys.stderr)
    print("error: the corpus is empty", file=sys.stderr)
    sys.exit(2)
if how == "bad_input":
    time.sleep(0.3)
    sys.exit(1)  # what a peer's loss looks like
if how == "crash" and rank == 0:
    raise ValueError("loss is nan")
if how == "no_done":
    sys.exit(0)
if rank == 0:
    metrics = folder / ("student" if how == "part" else "") / "metrics.jsonl"
    metrics.parent.mkdir(exist_ok=True)
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    with open(metrics, "a") as file:
        for step in range(done + 1, 11):
            line = {"step": step, "total": 10, "seconds": step / 2, "tokens": 600, "loss": 1 / step}
            print(json.dumps(line | {"pid": os.getpid()}), file=file, flush=True)
            if how == "hang" and step == 4:
                time.sleep(600)
if how == "port" and not (folder / "again").exists():
    (folder / "again").touch()
    sys.exit("The server could not be started: EADDRINUSE")
if how == "polite":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
if how in ("hang", "crash", "polite"):
    time.sleep(600)
if rank == 0:
    (folder / "hf").mkdir(exist_ok=True)
    result = {"accuracy": {"value": 0.5, "n": 100, "low": 0.4, "high": 0.6}}
    (folder / "eval.json").write_text(json.dumps(result))
    names = ("OMP_NUM_THREADS", "MKL_CBWR", "PYTHONHASHSEED", "HF_HUB_OFFLINE", "LOCAL_RANK")
    (folder / "env.json").write_text(json.dumps({name: os.environ[name] for name in names}))
    (folder / "DONE").touch()
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "stand_in_stage.py").write_text(STAGE)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'code'}{os.pathsep}{inherited}")
    return Recipe.load(tmp_path / "tiny.yaml")


def go(recipe: Recipe, run_dir: Path, only: str | None = None, start: str | None = None) -> Path:
    return run(recipe, run_dir, only=only, start=start, module="stand_in_stage")


def pids(run_dir: Path) -> list[int]:
    return [int(path.read_text()) for path in run_dir.glob("*/pid*") if path.read_text()]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.05)


def driver_process(tmp_path: Path) -> subprocess.Popen[str]:
    code = (
        "import sys; from q3mega import Recipe, run; "
        "run(Recipe.load(sys.argv[1]), sys.argv[2], module='stand_in_stage')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "tiny.yaml", tmp_path / "run"],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_run_leaves_the_folder_of_the_design(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = go(recipe, tmp_path / "run")
    assert report == tmp_path / "run" / "report.html" and report.exists()
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe
    first, second = tmp_path / "run" / "01-pretrain_general", tmp_path / "run" / "02-cold_start"
    assert (first / "DONE").exists() and (second / "DONE").exists()
    log = (first / "log.txt").read_text()
    assert "rank 0 of 2" in log and "rank 1 of 2" in log
    assert "rank 0 of 1" in (second / "log.txt").read_text()
    environment = json.loads((second / "env.json").read_text())
    assert environment["MKL_CBWR"] == "AVX2" and environment["PYTHONHASHSEED"] == "0"
    assert int(environment["OMP_NUM_THREADS"]) >= 1 and environment["LOCAL_RANK"] == "0"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["cold_start"]["accuracy"] == {"value": 0.5, "n": 100, "low": 0.4, "high": 0.6}
    printed = capsys.readouterr().out
    assert "cold_start:  done  10/10  loss 0.1000  1,200 tokens/s" in printed
    assert str(report) in printed and "0.400 to 0.600" in printed


def test_finished_stages_are_skipped(recipe: Recipe, tmp_path: Path) -> None:
    go(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "02-cold_start" / "log.txt").read_text()
    go(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "02-cold_start" / "log.txt").read_text() == before


def test_only_and_from(recipe: Recipe, tmp_path: Path) -> None:
    go(recipe, tmp_path / "run", only="pretrain_general")
    assert not (tmp_path / "run" / "02-cold_start").exists()
    go(recipe, tmp_path / "run", start="cold_start")
    assert (tmp_path / "run" / "02-cold_start" / "DONE").exists()
    with pytest.raises(UserError, match=r"--only cold_stat .*nearest is cold_start"):
        go(recipe, tmp_path / "run", only="cold_stat")


def test_a_checkpoint_of_another_function_is_refused_first(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    config = {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    last = Recipe.load(tmp_path / "tiny.yaml", [f"cold_start.init={folder}"])
    with pytest.raises(UserError, match="use_sliding_window"):
        go(last, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*-pretrain_general"))


def test_another_recipe_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    go(recipe, tmp_path / "run")
    other = Recipe.load(tmp_path / "tiny.yaml", ["cold_start.lr=0.5", "seed=8"])
    with pytest.raises(UserError) as caught:
        go(other, tmp_path / "run")
    assert "seed (7 -> 8), stages.cold_start.lr (0.001 -> 0.5)" in str(caught.value)
    assert "--run-dir" in str(caught.value)
    # The folders are numbered by place, so the order counts too.
    turned = recipe.model_copy(update={"stages": dict(reversed(recipe.stages.items()))})
    with pytest.raises(UserError, match="order of stages"):
        go(turned, tmp_path / "run")


def test_a_run_folder_that_is_a_file(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be made: File exists"):
        go(recipe, tmp_path / "tiny.yaml")


def test_bad_input_in_one_rank_is_the_reason_given(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVE", "pretrain_general:bad_input")
    with pytest.raises(UserError, match=r"^pretrain_general: the corpus is empty$"):
        go(recipe, tmp_path / "run")


def test_a_crash_shows_the_log_and_ends_the_other_rank(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVE", "pretrain_general:crash")
    with pytest.raises(StageFailed) as caught:
        go(recipe, tmp_path / "run")
    assert "exit code 1" in str(caught.value) and "01-pretrain_general/log.txt" in str(caught.value)
    assert "\nValueError: loss is nan" in str(caught.value)
    assert len(pids(tmp_path / "run")) == 2 and not any(map(alive, pids(tmp_path / "run")))
    # The next attempt goes on, and its own failure does not quote the old one.
    monkeypatch.setenv("BEHAVE", "pretrain_general:no_done")
    with pytest.raises(StageFailed) as caught:
        go(recipe, tmp_path / "run")
    assert "no DONE written" in str(caught.value) and "nan" not in str(caught.value)


def test_too_little_disk(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "MIN_FREE_BYTES", 2**60)
    with pytest.raises(UserError, match="free disk and pretrain_general needs"):
        go(recipe, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_killing_the_driver_ends_the_stage_and_a_new_run_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "run" / "01-pretrain_general"
    monkeypatch.setenv("BEHAVE", "pretrain_general:hang")
    process = driver_process(tmp_path)
    wait_for(lambda: len(recent_metrics(folder)) == 4 and len(pids(tmp_path / "run")) == 2)
    with pytest.raises(UserError, match=f"in use by process {process.pid}: .*--run-dir"):
        go(recipe, tmp_path / "run")
    ranks = pids(tmp_path / "run")
    assert all(map(alive, ranks))
    process.send_signal(signal.Signals[name])
    process.communicate()
    wait_for(lambda: not any(map(alive, ranks)))
    monkeypatch.delenv("BEHAVE")
    go(recipe, tmp_path / "run")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 11))
    assert len({record["pid"] for record in records[:4]}) == 1
    assert records[4]["pid"] != records[3]["pid"]


def test_progress_follows_the_part_that_is_at_work(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BEHAVE", "cold_start:part")
    go(recipe, tmp_path / "run")
    *_, general, cold = [
        line for line in capsys.readouterr().out.splitlines() if "  done  " in line
    ]
    assert "  10/10  " in general and "  student 10/10  " in cold


def test_only_whole_lines_count(tmp_path: Path) -> None:
    assert recent_metrics(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"note": 1}\n{"step": 3, "l')
    assert recent_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    path.write_text("".join(f'{{"step": {step}, "x": "{"y" * 9000}"}}\n' for step in range(30)))
    assert [record["step"] for record in recent_metrics(tmp_path)] == list(range(23, 30))


def test_command_line_errors(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run_dir = str(tmp_path / "tiny.yaml"), str(tmp_path / "run")
    assert cli.main(["run", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: recipe ")
    # Overrides are taken on either side of the options, the later one last.
    assert cli.main(["run", file, "seed=-1", "--run-dir", run_dir, "seed=-2"]) == 2
    assert "seed=-2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["run", file, "--no-such-option"])
    assert cli.main(["report", run_dir]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_run_folder_is_named_after_the_recipe(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in recipe.stages:  # all done, so that none of the real stages starts
        folder = recipe.stage_dir(Path("runs") / recipe.name, stage)
        folder.mkdir(parents=True)
        (folder / "DONE").touch()
    command = [sys.executable, "-m", "q3mega", "run", "tiny.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cold_start:  done before" in done.stdout
    assert done.stdout.strip().endswith(f"runs/{recipe.name}/report.html")


def test_doctor_names_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["torch", metadata.version("torch")] in found
    assert found[0][:2] == ["python", platform.python_version()]
    assert {(op, "reference", "ok") for op in dispatch.OPERATORS} <= set(map(tuple, found))


def test_a_stage_whose_port_was_taken_starts_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVE", "pretrain_general:port")
    go(recipe, tmp_path / "run")
    log = (tmp_path / "run" / "01-pretrain_general" / "log.txt").read_text()
    assert len({line.split("port ")[1] for line in log.splitlines() if "port " in line}) == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_run_that_is_asked_to_stop_lets_its_stage_save(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable, left in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(variable, left)  # by a launcher around it
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("BEHAVE", "cold_start:polite")
    code = (
        "import sys; from functools import partial; from q3mega import cli; "
        "from q3mega.launch import driver; "
        "driver.run = partial(driver.run, module='stand_in_stage'); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["run", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: len(recent_metrics(tmp_path / "run" / "02-cold_start")) == 10)
    time.sleep(0.2)
    process.send_signal(signal.Signals[name])
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "run again to go on" in said) == (75, True), said
    assert "rank 0 of 1" in (tmp_path / "run" / "02-cold_start" / "log.txt").read_text()
    monkeypatch.delenv("BEHAVE")
    go(recipe, tmp_path / "run")


@pytest.mark.slow
def test_a_file_gets_lines_whatever_the_colour(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    done, _ = driver_process(tmp_path).communicate(timeout=60)
    before, *_ = done.partition("\x1b")  # of the table of results, which may have colour
    assert "cold_start:  done  10/10" in before


@pytest.mark.parametrize("words", [["--help"], ["doctor"]])
def test_a_closed_pipe_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "q3mega", *words], stdout=writer, stderr=-1)
    os.close(writer)
    assert done.returncode in (0, 141) and done.stderr == b""  # argparse answers 0


def test_a_terminal_of_another_encoding(tmp_path: Path) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["report", str(tmp_path)]
    folder = tmp_path / "01-cold_start"
    folder.mkdir()
    result = {"\u6b63\u786e": {"value": 0.5, "n": 1}}
    (folder / "eval.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "-m", "q3mega", *words]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "\u6b63\u786e" in (tmp_path / "results.json").read_text(encoding="utf-8")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"q3mega {metadata.version('q3mega')}")
