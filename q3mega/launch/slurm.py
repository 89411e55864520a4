"""A recipe as a chain of SLURM jobs: one a stage, each with its own nodes and layout.

Every script stands alone: it can be read, changed and submitted by hand. Some minutes before its
time limit a job has its stage save, and goes back into the queue; so does one that is preempted or
whose node fails. It goes on from the stage's last checkpoint, and a stage that is done ends at
once. A rank that dies takes its job down (`srun --kill-on-bad-exit`), and the stages after it are
cancelled. Two jobs of one stage of one run never run at once: they bear one name (`singleton`), and
rank 0 holds a lock.
"""

import shlex
import subprocess
import sys
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from q3mega.config.recipe import Recipe
from q3mega.errors import EXIT_STOPPED, UserError
from q3mega.io import read_json, write_json
from q3mega.launch import run_folder
from q3mega.launch.driver import DETERMINISM

_LAST_SECONDS = 60  # before the limit, when a step that has not ended is cut
# What a stage has when it begins again: checkpoints, prepared data, weights.
_SAVED = "-name state.json -o -path '*/data/*' -o -path '*/hf/*'"
# The end of every script: what SIGUSR1, sent by SLURM before the limit, and the ranks' end do.
_ENDING = """
ranks=$!
asked=
guard=
stop() {{  # the limit is near: the ranks save after their step; a longer step is cut
  asked=yes
  kill -USR1 "$ranks" || true
  ( sleep {wait} && kill -KILL "$ranks" ) > /dev/null 2>&1 &
  guard=$!
}}
trap stop USR1
code=0
wait "$ranks" || code=$?
while kill -0 "$ranks" 2> /dev/null; do  # a signal ends a wait
  code=0
  wait "$ranks" || code=$?
done
trap '' USR1
[ -z "$guard" ] || kill "$guard" 2> /dev/null || true
[ -e {done} ] && code=0
if [ -n "$asked" ] || [ "$code" -eq {stopped} ]; then
  if [ "$code" -ne 0 ] && [ -z "$(find {folder} -newer {began} \( {saved} \) -print -quit)" ]; then
    echo "error: {stage} saved nothing within slurm.time={time}: give it more" >&2
    exit 1
  fi
  if [ "$code" -ne 0 ]; then
    echo "{stage} goes back into the queue and on from what it has saved" >&2
    scontrol requeue "$SLURM_JOB_ID" || echo "error: it may not: submit the chain again" >&2
    exit {stopped}
  fi
fi
[ "$code" -eq 0 ] || exit "$code"
"""


def write(recipe: Recipe, run_dir: Path) -> list[Path]:
    """RUN/slurm/<NN>-<stage>.sbatch for every stage; returns the paths in their order."""
    run_dir = run_dir.resolve()
    texts = {stage: script(recipe, run_dir, stage) for stage in recipe.stages}  # all can be asked
    _check_queue(run_dir)
    for sentence in run_folder.keep(recipe, run_dir):
        print(f"note: {sentence}", file=sys.stderr)
    folder = run_dir / "slurm"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{recipe.stage_dir(run_dir, stage).name}.sbatch" for stage in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def script(recipe: Recipe, run_dir: Path, stage: str) -> str:
    """The text of one stage's job."""
    ask, processes = recipe.slurm, recipe.stages[stage].layout.processes
    each = min(ask.processes_per_node, processes)
    if processes % each:
        raise UserError(
            f"stages.{stage}.layout.processes={processes} does not fill nodes of "
            f"slurm.processes_per_node={each}: make it a multiple"
        )
    options = {
        "job-name": f"{recipe.name}-{stage}-{zlib.crc32(str(run_dir).encode()):08x}",
        "dependency": "singleton",
        "nodes": processes // each,
        "ntasks-per-node": each,
        "cpus-per-task": ask.cpus_per_process,
        "gpus-per-node": each if ask.gpus and "gpu" not in (ask.gres or "") else None,
        "partition": ask.partition,
        "account": ask.account,
        "qos": ask.qos,
        "reservation": ask.reservation,
        "constraint": ask.constraint,
        "gres": ask.gres,
        "mem": ask.mem,
        "nodelist": ask.nodelist,
        "exclude": ask.exclude,
        "mail-type": ask.mail_type,
        "mail-user": ask.mail_user,
        "time": ask.time,
        "signal": f"B:USR1@{ask.lead}",
        "output": _pattern(run_dir / "slurm") + f"/{stage}-%j.log",
    }
    directives = [f"#SBATCH --{k}={_quoted(str(v))}" for k, v in options.items() if v is not None]
    directives += ["#SBATCH --exclusive"] * ask.exclusive
    directives += [f"#SBATCH {option}" for option in ask.options]
    folder = recipe.stage_dir(run_dir, stage)
    began = run_dir / "slurm" / f".{stage}.began"
    python, here = shlex.quote(ask.python or sys.executable), shlex.quote(sys.executable)
    run = shlex.quote(str(run_dir))
    settings = {**DETERMINISM, "OMP_NUM_THREADS": str(ask.cpus_per_process)}
    ending = _ENDING.format(
        wait=max(1, ask.lead - _LAST_SECONDS), stopped=EXIT_STOPPED, stage=stage, time=ask.time,
        done=shlex.quote(str(folder / "DONE")), folder=shlex.quote(str(folder)),
        began=shlex.quote(str(began)), saved=_SAVED,
    )  # fmt: skip
    return "\n".join(
        [
            "#!/bin/bash",
            *directives,
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "",
            f"[ -e {shlex.quote(str(folder / 'DONE'))} ] && exit 0",
            *ask.setup,  # of the site, which writes for a shell without further rules
            "set -euo pipefail",
            f"mkdir -p {shlex.quote(str(folder))} {shlex.quote(str(began.parent))}",
            f"touch {shlex.quote(str(began))}",
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f'MASTER_PORT=$({here} -c \'import socket as s; print(s.create_server(("", 0))'
            ".getsockname()[1])')",
            "export MASTER_ADDR MASTER_PORT",
            *(f"export {name}={shlex.quote(value)}" for name, value in settings.items()),
            "",
            "# The ranks, with the variables that torchrun would set.",
            f"srun --kill-on-bad-exit=1 --cpus-per-task={ask.cpus_per_process} "
            f"{_container(recipe, run_dir)}bash -c '",
            "  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS",
            "  export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE",
            f'  exec "$@"\' - {python} -P -m q3mega.stages {run} {stage} &{ending}',
            f"{here} -P -m q3mega report {run}",
            "",
        ]
    )


def _container(recipe: Recipe, run_dir: Path) -> str:
    """pyxis's options of srun; the run folder is seen inside at its own path."""
    ask = recipe.slurm
    if ask.container_image is None:
        return ""
    targets = [(mount.split(":") * 2)[1] for mount in ask.container_mounts]
    seen = any(run_dir.is_relative_to(PurePosixPath(target)) for target in targets)
    mounts = [*ask.container_mounts, *([] if seen else [f"{run_dir}:{run_dir}"])]
    image = shlex.quote(f"--container-image={ask.container_image}")
    return f"{image} {shlex.quote('--container-mounts=' + ','.join(mounts))} "


def _pattern(path: Path) -> str:
    """A path where sbatch would put job numbers in for what begins with a percent sign."""
    text = str(path)
    if any(ord(c) < 32 or c == "\\" for c in text):
        raise UserError(f"--run-dir {text!r}: SLURM takes no such path; leave out \\ and newlines")
    return text.replace("%", "%%")


def _quoted(value: str) -> str:
    """As sbatch reads its lines: a backslash within double quotes, which end at the next one."""
    if value == shlex.quote(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def submit(paths: list[Path]) -> list[str]:
    """Put the jobs in the queue, each after the one before has ended well; their numbers.

    UserError when sbatch refuses one: those before it are taken back. UserError, too, while a
    chain of this run is in the queue.
    """
    _check_queue(paths[0].parent.parent)
    jobs: list[str] = []
    for path in paths:
        after = ["--dependency", f"singleton,afterok:{jobs[-1]}"] if jobs else []
        try:
            jobs.append(
                _ask("sbatch", "--parsable", "--kill-on-invalid-dep=yes", *after, str(path)).split(
                    ";"
                )[0]
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"sbatch refused {path}: {_reason(error)}{_take_back(jobs)}") from None
    write_json(_kept(paths[0].parent), jobs)
    return jobs


def _take_back(jobs: list[str]) -> str:
    if not jobs:
        return ""
    try:
        _ask("scancel", *jobs)
    except (OSError, subprocess.CalledProcessError):
        return f"; before it jobs {', '.join(jobs)} were queued: scancel {' '.join(jobs)}"
    return f"; jobs {', '.join(jobs)} before it were taken back"


def _check_queue(run_dir: Path) -> None:
    try:
        jobs = read_json(_kept(run_dir / "slurm"))
        states = _ask("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%i %T")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return  # none was submitted, or squeue knows none of them; `singleton` holds in any case
    known = states.split()[::2]
    if queued := [job for job in jobs if job in known]:
        raise UserError(
            f"{run_dir} is in the queue as jobs {', '.join(queued)}: wait for their end, or "
            f"scancel {' '.join(queued)}"
        )


def _kept(folder: Path) -> Path:
    return folder / "jobs.json"


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _reason(error: Any) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is not on the PATH; submit where SLURM is installed"
    return (getattr(error, "stderr", "") or str(error)).strip()
