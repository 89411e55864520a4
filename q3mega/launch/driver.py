"""Runs a recipe: the stages in order, each as a group of processes, resumed by itself after a cut.

A stage is `python -m q3mega.stages RUN_DIR STAGE`, once per rank, with torchrun's environment
(RANK, WORLD_SIZE, MASTER_PORT, ...). The ranks are direct children, without a launcher between, so
that each exit code is seen and the kernel ends them when this process dies, however it dies. A
stage writes DONE last; one without DONE is started again and goes on from its checkpoints.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from q3mega.config.recipe import Recipe
from q3mega.config.section import nearest
from q3mega.errors import EXIT_STOPPED, UserError
from q3mega.launch import run_folder
from q3mega.launch.preflight import check_files
from q3mega.launch.progress import Progress
from q3mega.report import page

MIN_FREE_BYTES = 200 * 2**20
DETERMINISM = {  # what makes a run repeat bit for bit
    "MKL_CBWR": "AVX2",  # the same matmul kernels whatever the memory alignment
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUTF8": "1",  # whatever the locale
}
_LAUNCHERS = ("TORCHELASTIC_", "PET_", "GROUP_", "ROLE_")  # of one that is about already
_PORTS = 3  # tries
_POLL_SECONDS = 0.2
_LIBC = ctypes.CDLL(None)  # loaded before any fork
_PR_SET_PDEATHSIG = 1


class StageFailed(RuntimeError):
    """A stage ended for another reason than bad input; the message ends with its last output."""


class RunStopped(RuntimeError):
    """A signal asked the run to stop; the stage at work has saved and goes on at the next start."""


def run(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    only: str | None = None,
    start: str | None = None,
    module: str = "q3mega.stages",
) -> Path:
    """Run every stage of `recipe` that is not done yet; return the path of page.html.

    `only` picks one stage, `start` leaves out those before it. `module` is the program that runs
    one rank of one stage. SIGTERM and SIGUSR1 have the stage at work save and end, a second one
    ends it at once. Raises UserError for bad input, StageFailed when a stage breaks, RunStopped.
    """
    run_dir = Path(run_dir)
    stages = _chosen(recipe, only, start)
    run_folder.compare(recipe, run_dir)
    check_files(recipe)
    _check_disk(run_dir, stages[0])
    with (
        run_folder.held(recipe, run_dir) as changed,
        Progress(recipe) as progress,
        _Stop() as stop,
    ):
        for sentence in changed:
            progress.tell(f"note: {sentence}")
        for stage in stages:
            folder = recipe.stage_dir(run_dir, stage)
            if (folder / "DONE").exists():
                progress.show(stage, folder, "done before")
                continue
            _check_disk(run_dir, stage)
            folder.mkdir(exist_ok=True)
            _run_stage(recipe, run_dir, stage, module, progress, stop)
    return page.publish(run_dir)


def _chosen(recipe: Recipe, only: str | None, start: str | None) -> list[str]:
    stages = list(recipe.stages)
    for flag, stage in (("--only", only), ("--from", start)):
        if stage is not None and stage not in stages:
            raise UserError(
                f"{flag} {stage} is not a stage of this recipe, {nearest(stage, stages)}"
            )
    if only:
        return [only]
    return stages[stages.index(start) :] if start else stages


class _Stop:
    """Passes SIGTERM and SIGUSR1 on to the ranks as the word to save and end; a second one is
    SystemExit, which unwinds and kills them. Of a thread that is not the main one none come."""

    def __init__(self) -> None:
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.asked = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.ranks:
            raise SystemExit(128 + number)
        self.asked = True
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                rank.send_signal(signal.SIGUSR1)


def _check_disk(run_dir: Path, stage: str) -> None:
    folder = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(folder).free) < MIN_FREE_BYTES:
        raise UserError(
            f"{run_dir} has {free >> 20} MB of free disk and {stage} needs "
            f"{MIN_FREE_BYTES >> 20} MB: free some, or choose another --run-dir"
        )


def _run_stage(
    recipe: Recipe, run_dir: Path, stage: str, module: str, progress: Progress, stop: _Stop
) -> None:
    """Until it is done, with another port where a program took the first before rank 0 did."""
    folder = recipe.stage_dir(run_dir, stage)
    log = folder / "log.txt"
    for last in (*[False] * (_PORTS - 1), True):
        size = log.stat().st_size if log.exists() else 0
        rank, code = _run_ranks(recipe, run_dir, stage, module, progress, stop)
        if not code and (folder / "DONE").exists():
            return progress.show(stage, folder, "done")
        written = _written(log, size)
        if last or stop.asked or code <= 0 or "EADDRINUSE" not in written:
            break
    if stop.asked or code == EXIT_STOPPED:
        progress.show(stage, folder, "stopped")
        raise RunStopped(f"{stage} was asked to stop: run again to go on; log: {log}")
    progress.show(stage, folder, "failed")
    raise _failure(stage, rank, code, log, written)


def _run_ranks(
    recipe: Recipe, run_dir: Path, stage: str, module: str, progress: Progress, stop: _Stop
) -> tuple[int, int]:
    """Start the stage's processes and wait for their end: `_verdict`."""
    folder = recipe.stage_dir(run_dir, stage)
    # -P: the working folder stays off sys.path, where it could shadow an installed package.
    command = [sys.executable, "-P", "-m", module, str(run_dir), stage]
    ranks = stop.ranks = []
    try:
        with open(folder / "log.txt", "ab") as output:
            for environment in _environments(recipe.stages[stage].layout.processes):
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,  # a rank and its children die as one, by _kill
                        preexec_fn=_die_with(os.getpid()),
                    )
                )
        while any(rank.poll() is None for rank in ranks) and not any(r.returncode for r in ranks):
            progress.show(stage, folder, "stopping" if stop.asked else "running")
            time.sleep(_POLL_SECONDS)
        return _verdict(ranks)
    finally:
        for each in ranks:
            _kill(each)


def _environments(processes: int) -> list[dict[str, str]]:
    """torchrun's variables for each rank, in place of those of any launcher around us."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    around = {name: v for name, v in os.environ.items() if not name.startswith(_LAUNCHERS)}
    shared = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **around,
        **DETERMINISM,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]


def _die_with(parent: int) -> Callable[[], None]:
    """For the child, between fork and exec: ask Linux to kill it when `parent` dies."""

    def ask() -> None:
        if sys.platform == "linux":
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before we asked
                os._exit(1)

    return ask


def _verdict(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """(rank, exit code) of the end that explains the others: bad input (2), a stop, a signal, a
    failure.

    When one rank breaks, its peers follow with errors of their own, or hang; a moment is enough to
    tell who had the reason.
    """
    deadline = time.monotonic() + 2.0
    while any(r.poll() is None for r in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS / 4)
    ends = [(rank, process.returncode) for rank, process in enumerate(ranks) if process.returncode]
    reasons = (2, EXIT_STOPPED)
    # signals are negative
    return min(ends, key=lambda end: (end[1] not in reasons, end[1]), default=(0, 0))


def _kill(rank: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody left (macOS says the latter)
        os.killpg(rank.pid, signal.SIGKILL)  # also what a finished rank has left behind
    rank.wait()


def _written(log: Path, size: int) -> str:
    """What was added to a log of `size` bytes."""
    with open(log, "rb") as file:
        file.seek(size)
        return file.read().decode("utf-8", errors="replace")


def _failure(stage: str, rank: int, code: int, log: Path, written: str) -> Exception:
    if code == -signal.SIGKILL:  # without a word, and what its peers then wrote is not the reason
        return StageFailed(
            f"{stage} failed: rank {rank} was killed by SIGKILL (the kernel does so when memory "
            "runs out), and its peers ended with it; run again to go on from the last checkpoint; "
            f"log: {log}"
        )
    lines = written.rstrip().split("\n")
    reasons = [line for line in lines if line.startswith("error:")]
    if code == 2 and reasons:
        return UserError(f"{stage}: {reasons[-1].removeprefix('error:').strip()}")
    how = f"rank {rank}: exit code {code}" if code else "no DONE written"
    if code < 0:
        how = f"rank {rank}: killed by {signal.Signals(-code).name}"
    return StageFailed("\n".join([f"{stage} failed ({how}), see {log}", *lines[-15:]]))
