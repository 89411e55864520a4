"""Runs a recipe: the stages in order, each as a group of processes, resumed by itself after a cut.

A stage is `python -m q3mega.stages RUN_DIR STAGE`, once per rank, with torchrun's environment
(RANK, WORLD_SIZE, MASTER_PORT, ...). The ranks are direct children, without a launcher between, so
that each exit code is seen and the kernel ends them when this process dies, however it dies. A
stage writes DONE last; one without DONE is started again and goes on from its checkpoints.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from q3mega import report
from q3mega.errors import UserError
from q3mega.preflight import check_files
from q3mega.recipe import Recipe
from q3mega.sections import nearest

MIN_FREE_BYTES = 200 * 2**20
DETERMINISM = {  # what makes a run repeat bit for bit
    "MKL_CBWR": "AVX2",  # the same matmul kernels whatever the memory alignment
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_POLL_SECONDS = 0.2
_PLAIN_LINE_SECONDS = 15.0
_LIBC = ctypes.CDLL(None)  # loaded before any fork
_PR_SET_PDEATHSIG = 1


class StageFailed(RuntimeError):
    """A stage ended for another reason than bad input; the message ends with its last output."""


def run(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    only: str | None = None,
    start: str | None = None,
    module: str = "q3mega.stages",
) -> Path:
    """Run every stage of `recipe` that is not done yet; return the path of report.html.

    `only` picks one stage, `start` leaves out those before it. `module` is the program that runs
    one rank of one stage. Raises UserError for bad input, StageFailed when a stage breaks.
    """
    run_dir = Path(run_dir)
    stages = _chosen(recipe, only, start)
    prepare(recipe, run_dir)
    check_files(recipe)
    with _lock(run_dir), _Progress(recipe) as progress:
        for stage in stages:
            folder = recipe.stage_dir(run_dir, stage)
            if (folder / "DONE").exists():
                progress.show(stage, folder, "done before")
                continue
            _check_disk(run_dir, stage)
            folder.mkdir(exist_ok=True)
            _run_stage(recipe, run_dir, stage, module, progress)
    return report.publish(run_dir)


def prepare(recipe: Recipe, run_dir: Path) -> None:
    """Make the run folder and keep the recipe there; UserError when it holds another one."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be made: {error.strerror}") from None
    _keep_recipe(recipe, run_dir)


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


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """One driver a run folder: a lock that the kernel drops when its holder dies."""
    with open(run_dir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"run folder {run_dir} is in use by process {file.read().strip()}: "
                "wait for it, or choose another --run-dir"
            ) from None
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield


def _keep_recipe(recipe: Recipe, run_dir: Path) -> None:
    path = run_dir / "recipe.yaml"
    if not path.exists():
        recipe.dump(path)
        return
    before, now = (
        _flat(r.model_dump(mode="json")) | {"order of stages": list(r.stages)}
        for r in (Recipe.load(path), recipe)
    )
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key} ({before.get(key)} -> {now.get(key)})" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{path} holds another recipe: {shown}{more}; choose another --run-dir to change it"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _check_disk(run_dir: Path, stage: str) -> None:
    if (free := shutil.disk_usage(run_dir).free) < MIN_FREE_BYTES:
        raise UserError(
            f"{run_dir} has {free >> 20} MB of free disk and {stage} needs "
            f"{MIN_FREE_BYTES >> 20} MB: free some, or choose another --run-dir"
        )


def _run_stage(
    recipe: Recipe, run_dir: Path, stage: str, module: str, progress: "_Progress"
) -> None:
    folder = recipe.stage_dir(run_dir, stage)
    log = folder / "log.txt"
    size = log.stat().st_size if log.exists() else 0
    processes = recipe.stages[stage].layout.processes
    # -P: the working folder stays off sys.path, where it could shadow an installed package.
    command = [sys.executable, "-P", "-m", module, str(run_dir), stage]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with open(log, "ab") as output:
            for environment in _environments(processes):
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
            progress.show(stage, folder, "running")
            time.sleep(_POLL_SECONDS)
        rank, code = _verdict(ranks)
    finally:
        for each in ranks:
            _kill(each)
    if code or not (folder / "DONE").exists():
        progress.show(stage, folder, "failed")
        raise _failure(stage, rank, code, log, size)
    progress.show(stage, folder, "done")


def _environments(processes: int) -> list[dict[str, str]]:
    """torchrun's variables for each rank."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
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
    """(rank, exit code) of the end that explains the others: bad input (2), a signal, a failure.

    When one rank breaks, its peers follow with errors of their own, or hang; a moment is enough to
    tell who had the reason.
    """
    deadline = time.monotonic() + 2.0
    while any(r.poll() is None for r in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS / 4)
    ends = [(rank, process.returncode) for rank, process in enumerate(ranks) if process.returncode]
    return min(ends, key=lambda end: (end[1] != 2, end[1]), default=(0, 0))  # signals are negative


def _kill(rank: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody left (macOS says the latter)
        os.killpg(rank.pid, signal.SIGKILL)  # also what a finished rank has left behind
    rank.wait()


def _failure(stage: str, rank: int, code: int, log: Path, size: int) -> Exception:
    if code == -signal.SIGKILL:  # without a word, and what its peers then wrote is not the reason
        return StageFailed(
            f"{stage} failed: rank {rank} was killed by SIGKILL (the kernel does so when memory "
            "runs out), and its peers ended with it; run again to go on from the last checkpoint; "
            f"log: {log}"
        )
    with open(log, "rb") as file:
        file.seek(size)  # what this attempt wrote
        lines = file.read().decode(errors="replace").splitlines()
    reasons = [line for line in lines if line.startswith("error:")]
    if code == 2 and reasons:
        return UserError(f"{stage}: {reasons[-1].removeprefix('error:').strip()}")
    how = f"rank {rank}: exit code {code}" if code else "no DONE written"
    if code < 0:
        how = f"rank {rank}: killed by {signal.Signals(-code).name}"
    return StageFailed("\n".join([f"{stage} failed ({how}), see {log}", *lines[-15:]]))


def _at_work(folder: Path) -> Path:
    """The stage's folder, or that part of it (a student, a comparison) whose record is newest."""
    written = [p for p in (folder, *folder.iterdir()) if (p / "metrics.jsonl").exists()]
    return max(written, key=lambda p: (p / "metrics.jsonl").stat().st_mtime_ns, default=folder)


def recent_metrics(folder: Path) -> list[dict[str, Any]]:
    """The last whole lines of metrics.jsonl that count steps, at most twenty, oldest first."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines[-20:]:
        with suppress(ValueError):  # cut at either end
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def _speed(records: Sequence[Mapping[str, Any]]) -> str:
    """Tokens a second over the steps between the first and the last record."""
    try:
        seconds = records[-1]["seconds"] - records[0]["seconds"]
        tokens = sum(record["tokens"] for record in records[1:])
    except (IndexError, KeyError):
        return ""
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""  # < 0: resumed in between


class _Progress:
    """One line a stage: a live table on a terminal, a line now and then elsewhere."""

    def __init__(self, recipe: Recipe) -> None:
        self.rows = {stage: ["waiting"] for stage in recipe.stages}
        self.started: dict[str, float] = {}
        self.state: dict[str, str] = {}
        self.printed = 0.0
        console = Console()
        # No refresh thread: forking with threads about is asking for trouble.
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "_Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, stage: str, folder: Path, state: str) -> None:
        now = time.monotonic()
        elapsed = now - self.started.setdefault(stage, now)
        part = _at_work(folder)
        records = recent_metrics(part)
        last = records[-1] if records else {}
        name = "" if part == folder else f"{part.name} "
        row = [f"{name}{last['step']}/{last.get('total', '?')}" if last else ""]
        for key in ("reward", "loss"):
            if isinstance(value := last.get(key), int | float):
                row.append(f"{key} {value:.4f}")
                break
        else:
            row.append("")
        row.append(_speed(records))
        row.append("" if state == "done before" else f"{elapsed:.0f} s")
        self.rows[stage] = [state, *row]
        if self.live:
            self.live.update(self._table(), refresh=True)
        elif state != self.state.get(stage) or now - self.printed > _PLAIN_LINE_SECONDS:
            self.printed = now
            print(f"{stage}:", *filter(None, self.rows[stage]), sep="  ", flush=True)
        self.state[stage] = state

    def _table(self) -> Table:
        table = Table("stage", "state", "step", "last", "speed", "time", box=None)
        for stage, row in self.rows.items():
            table.add_row(stage, *row)
        return table
