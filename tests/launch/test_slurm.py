"""Job scripts, and a real one-node SLURM that preempts a stage and finishes the chain."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from q3mega.cli import main
from q3mega.config.recipe import Recipe
from q3mega.errors import UserError
from q3mega.launch import slurm

TINY = Path(__file__).parents[1] / "helpers" / "tiny.yaml"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ON_CPUS = ["slurm.gpus=false", "slurm.cpus_per_process=1", "slurm.processes_per_node=2"]


def test_a_script_asks_for_what_the_layout_needs(tmp_path: Path) -> None:
    recipe = Recipe.load(
        TINY,
        [
            "pretrain_long.layout.processes=16",
            "slurm.partition=h100",
            "slurm.setup=[module load x]",
        ],
    )
    text = slurm.script(recipe, tmp_path / "a run", "pretrain_long")
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=h100"):
        assert f"#SBATCH {line}\n" in text
    assert "\nmodule load x\n" in text
    assert "#SBATCH --requeue" in text
    assert "account" not in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_nodes_are_filled(tmp_path: Path) -> None:
    recipe = Recipe.load(TINY, ["cold_start.layout.processes=12"])
    with pytest.raises(UserError, match=r"processes=12 does not fill nodes of .*=8"):
        slurm.write(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_stage_has_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", str(TINY), "--run-dir", str(tmp_path)]) == 0
    paths = [Path(line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert [p.stem for p in paths] == [
        Recipe.load(TINY).stage_dir(tmp_path, stage).name for stage in Recipe.load(TINY).stages
    ]
    assert all(p.exists() for p in paths)
    assert (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("slurm/*.sbatch")), ids=lambda p: p.stem)
def test_the_examples_are_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("qwen3_*.yaml")), ids=lambda p: p.stem)
def test_the_large_examples_become_chains(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    scripts = slurm.write(recipe, tmp_path / "run")
    assert len(scripts) == len(recipe.stages)
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert "export NCCL_DEBUG=WARN" in script.read_text()


def stand_in(folder: Path, name: str, lines: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that write down how they were called; sbatch refuses the third job."""
    folder = tmp_path / "bin"
    count = f'echo "$0 $@" >> {folder}/asked; n=$(grep -c sbatch {folder}/asked)'
    stand_in(
        folder, "sbatch", f"{count}; [ $n -lt 3 ] || {{ echo no such qos >&2; exit 1; }}; echo $n"
    )
    stand_in(folder, "scancel", f'echo "scancel $@" >> {folder}/asked')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_submission_that_is_cut_is_taken_back(queue: Path, tmp_path: Path) -> None:
    paths = slurm.write(Recipe.load(TINY), tmp_path / "run")
    with pytest.raises(UserError, match="no such qos; jobs 1, 2 before it were taken back"):
        slurm.submit(paths)
    asked = (queue / "asked").read_text()
    assert "afterok:1" in asked and asked.endswith("scancel 1 2\n")
    stand_in(queue, "scancel", "exit 1")
    (queue / "asked").unlink()
    with pytest.raises(UserError, match="jobs 1, 2 were queued: scancel 1 2"):
        slurm.submit(paths)


def test_a_run_in_the_queue_is_not_submitted_again(queue: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(TINY)
    paths = slurm.write(recipe, tmp_path / "run")[:2]
    slurm.submit(paths)
    stand_in(queue, "squeue", "echo 2 PENDING")
    with pytest.raises(UserError, match=r"in the queue as jobs 2: .*scancel 2"):
        slurm.submit(paths)
    with pytest.raises(UserError, match="in the queue"):
        slurm.write(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("ranks", "code", "words"),
    [
        ("sleep 0.5; touch {folder}/DONE", 0, ""),
        ("exit 3", 3, ""),
        ("kill -USR1 $PPID; mkdir -p {folder}/data; sleep 0.5; touch {folder}/data/x; exit 75", 75,
         "requeue 7"),
        ("kill -USR1 $PPID; sleep 0.5; exit 75", 1, ""),  # nothing saved: it would never end
        ("kill -USR1 $PPID; sleep 0.5; touch {folder}/DONE", 0, ""),
    ],
)  # fmt: skip
def test_what_a_script_does_at_its_end(tmp_path: Path, ranks: str, code: int, words: str) -> None:
    bin, run_dir = tmp_path / "bin", tmp_path / 'a run\'s "best"'
    (tmp_path / "activate").write_text('export X="$NOT_SET"; false\n')  # as sites write them
    recipe = Recipe.load(TINY, [f"slurm.setup=[source {tmp_path}/activate]"])
    folder = recipe.stage_dir(run_dir, "cold_start")
    quoted = str(folder).replace("'", "\\'").replace('"', '\\"').replace(" ", "\\ ")
    stand_in(bin, "srun", "trap '' USR1; " + ranks.format(folder=quoted))
    stand_in(bin, "scontrol", f'echo "$@" >> {tmp_path}/asked; echo node')
    text = slurm.script(recipe, run_dir, "cold_start")
    text = "\n".join(line for line in text.splitlines() if "q3mega report" not in line)
    environment = {"PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment["SLURM_JOB_NODELIST"] = "node"
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == bool(words)


def test_what_a_site_can_ask_for(tmp_path: Path) -> None:
    given = {
        "qos": "high", "reservation": "r", "constraint": "a&b", "gres": "gpu:h100:8", "mem": "0",
        "nodelist": "n[1-2]", "exclude": "n3", "mail_type": "END", "mail_user": "a@b",
        "exclusive": "true", "options": "['--licenses=x:1']", "container_image": "nvcr.io#x:1",
        "container_mounts": "['/data:/data']", "python": "python3",
    }  # fmt: skip
    words = [f"slurm.{name}={value}" for name, value in given.items()]
    text = slurm.script(Recipe.load(TINY, words), tmp_path, "cold_start")
    asked = ("qos=high", "reservation=r", 'constraint="a&b"', "gres=gpu:h100:8", "mem=0",
             'nodelist="n[1-2]"', "exclude=n3", "mail-type=END", "exclusive", "licenses=x:1",
             "signal=B:USR1@600", "dependency=singleton")  # fmt: skip
    for line in asked:
        assert f"#SBATCH --{line}\n" in text
    assert "gpus-per-node" not in text
    assert f"--container-mounts=/data:/data,{tmp_path}:{tmp_path} bash -c" in text
    assert "'--container-image=nvcr.io#x:1'" in text and " python3 -P -m q3mega.stages" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


CONF = """
ClusterName=q3mega
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2
MailProg=/bin/true
KillWait=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Debian's slurm-wlm as one controller and one node of two cores."""
    programs = [shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin") for p in DAEMONS]
    if None in programs:
        pytest.skip("needs slurmctld and slurmd (Debian: slurm-wlm)")
    folder = tmp_path / "slurm"
    folder.mkdir()
    host = socket.gethostname().split(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, user=user, folder=folder, ports=(_port(), _port())))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    daemons = [subprocess.Popen([program, "-D"]) for program in programs]  # type: ignore[list-item]
    try:
        wait(lambda: "idle" in ask("sinfo", "-h", "-o", "%T"), 60)
        yield
    finally:
        ask("scancel", "--user", user)
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


DAEMONS = ("slurmctld", "slurmd")


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait(until: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, ask("squeue", "-l")
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", ["plain", 'a run\'s "best" #1, 100%j \u00e9'])
@pytest.mark.parametrize("cut", ["preempted", "near its limit"])
def test_a_chain_that_is_cut_finishes_as_an_uncut_run(
    tmp_path: Path, cluster: None, name: str, cut: str
) -> None:
    raw = yaml.safe_load(TINY.read_text())
    kept = ("pretrain_general", "pretrain_reasoning")
    raw["stages"] = {name: raw["stages"][name] for name in kept}
    recipe = tmp_path / "two.yaml"
    recipe.write_text(yaml.safe_dump(raw, sort_keys=False))

    runs = {"uncut": tmp_path / "uncut", "queued": tmp_path / name}
    command = [sys.executable, "-m", "q3mega", "run", str(recipe), *ON_CPUS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--run-dir", str(runs["uncut"])], check=True, env=environment)

    paths = slurm.write(Recipe.load(recipe, ON_CPUS), runs["queued"])
    jobs = slurm.submit(paths)
    saved = runs["queued"] / "01-pretrain_general" / "checkpoints"
    wait(lambda: any(saved.glob("step_??????")), 120)
    with pytest.raises(UserError, match=f"in the queue as jobs {jobs[0]}, {jobs[1]}: .* scancel"):
        slurm.submit(paths)
    if cut == "preempted":
        assert ask("scontrol", "requeue", jobs[0]) == ""
    else:
        assert ask("scancel", "--signal=USR1", "--batch", jobs[0]) == ""
    wait(lambda: "Restarts=1" in ask("scontrol", "show", "job", jobs[0]), 60)
    wait(lambda: all("COMPLETED" in ask("scontrol", "show", "job", j) for j in jobs), 300)
    for stage in ("01-pretrain_general", "02-pretrain_reasoning"):
        uncut, queued = (run / stage / "hf" / "model.safetensors" for run in runs.values())
        assert uncut.read_bytes() == queued.read_bytes()
    assert (runs["queued"] / "report.html").exists()
    log = next((runs["queued"] / "slurm").glob("pretrain_general-*.log")).read_text()
    assert ("goes back into the queue" in log) == (cut == "near its limit")
