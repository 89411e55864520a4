"""A recipe as a chain of SLURM jobs: one a stage, each with its own nodes and layout.

Every script stands alone: it can be read, changed and submitted by hand. A job that is preempted
or whose node fails is put back in the queue and goes on from its stage's last checkpoint; a stage
that is done ends at once. A rank that dies takes its job down (`srun --kill-on-bad-exit`), and the
stages after it do not start.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from q3mega.driver import DETERMINISM, prepare
from q3mega.errors import UserError
from q3mega.recipe import Recipe


def write(recipe: Recipe, run_dir: Path) -> list[Path]:
    """RUN/slurm/<NN>-<stage>.sbatch for every stage; returns the paths in their order."""
    run_dir = run_dir.resolve()
    texts = {stage: script(recipe, run_dir, stage) for stage in recipe.stages}  # all can be asked
    prepare(recipe, run_dir)
    folder = run_dir / "slurm"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{recipe.stage_dir(run_dir, stage).name}.sbatch" for stage in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
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
        "job-name": f"{recipe.name}-{stage}",
        "nodes": processes // each,
        "ntasks-per-node": each,
        "cpus-per-task": ask.cpus_per_process,
        "gpus-per-node": each if ask.gpus else None,
        "partition": ask.partition,
        "account": ask.account,
        "time": ask.time,
        "output": run_dir / "slurm" / f"{stage}-%j.log",
    }
    asked = [f"#SBATCH --{k}={v}" for k, v in options.items() if v is not None]
    done = shlex.quote(str(recipe.stage_dir(run_dir, stage) / "DONE"))
    python = shlex.quote(sys.executable)
    run = shlex.quote(str(run_dir))
    settings = {**DETERMINISM, "OMP_NUM_THREADS": str(ask.cpus_per_process)}
    return "\n".join(
        [
            "#!/bin/bash",
            *asked,
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "",
            "set -euo pipefail",
            f"[ -e {done} ] && exit 0",
            *ask.setup,
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            "export MASTER_ADDR MASTER_PORT",
            *(f"export {name}={shlex.quote(value)}" for name, value in settings.items()),
            "",
            "# The ranks, with the variables that torchrun would set.",
            f"srun --kill-on-bad-exit=1 --cpus-per-task={ask.cpus_per_process} bash -c '",
            "  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS",
            "  export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE",
            f'  exec "$@"\' - {python} -P -m q3mega.stages {run} {stage}',
            f"{python} -P -m q3mega.cli report {run}",
            "",
        ]
    )


def submit(paths: list[Path]) -> list[str]:
    """Put the jobs in the queue, each after the one before has ended well; their numbers."""
    jobs: list[str] = []
    for path in paths:
        after = [f"--dependency=afterok:{jobs[-1]}"] if jobs else []
        try:
            done = subprocess.run(
                ["sbatch", "--parsable", *after, str(path)], capture_output=True, text=True
            )
        except FileNotFoundError:
            raise UserError("sbatch is not on the PATH: submit where SLURM is installed") from None
        if done.returncode:
            raise UserError(f"sbatch refused {path}: {done.stderr.strip()}")
        jobs.append(done.stdout.strip().split(";")[0])
    return jobs
