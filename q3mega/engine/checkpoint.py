"""Training checkpoints in megatron-core's distributed format: a cut save never shadows a good one.

A checkpoint holds weights, optimizer, schedule, random state and the stage's own state (position in
the data, controllers). A thread writes a copy of them beside the final name while training goes on,
and the ranks publish it by one rename when all have written; every file's checksum stands in its
state.json. It loads under any layout.
"""

import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from q3mega import device

# isort: split
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from q3mega.engine import parallel
from q3mega.engine.optimizer import TOO_FAST
from q3mega.errors import UserError

KEEP = 2
TENSORS = "state.safetensors"  # of the stage's own state


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _weights(engine: Any) -> dict[str, Any]:
    several = len(engine.chunks) > 1
    return {
        f"model{i}" if several else "model": chunk.sharded_state_dict(metadata=_metadata())
        for i, chunk in enumerate(engine.chunks)
    }


def _sharded_state(engine: Any, *, loading: bool) -> dict[str, Any]:
    models = _weights(engine)
    optimizer = engine.optimizer.sharded_state_dict(
        models if len(models) > 1 else models["model"], is_loading=loading, metadata=_metadata()
    )
    return {**models, "optimizer": optimizer, "schedule": engine.schedule.state_dict()}


@dataclass
class _Writing:
    """A checkpoint on its way to the disk."""

    unfinished: Path
    final: Path
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    request: Any
    checksums: dict[str, int] = field(default_factory=dict)
    failure: str | None = None

    def __post_init__(self) -> None:
        self.rng = {"torch": torch.get_rng_state()}
        tensors = self.request.preload_fn() if self.request.preload_fn else []  # off the GPU
        self.buckets = [(path, name, (raw, _copied(pairs))) for path, name, (raw, pairs) in tensors]
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        try:
            name = f"rng_{dist.get_rank()}.pt"
            torch.save(self.rng, self.unfinished / name)
            if self.tensors and dist.get_rank() == 0:
                save_file(self.tensors, self.unfinished / TENSORS)
            if self.buckets:
                rank, _, results = self.request.async_fn_args
                self.request.async_fn(rank, self.buckets, results)
                outcome = results.get()  # megatron's word for what went wrong, or the records
                if isinstance(outcome, Exception):
                    raise outcome
                results.put(outcome)
            for file in (name, *(name for _, name, _ in self.buckets)):
                self.checksums[file] = _crc(self.unfinished / file)
        except Exception as error:
            self.failure = str(error).splitlines()[0] if str(error) else type(error).__name__


def _copied(pairs: list[tuple[Any, torch.Tensor]]) -> list[tuple[Any, torch.Tensor]]:
    """What training goes on to change; a GPU's tensors were copied on their way here."""
    return [(item, x if device.HAS_GPU else x.clone()) for item, x in pairs]


class Saver:
    """Saves an engine's state behind its training, one checkpoint at a time. All ranks call."""

    def __init__(self) -> None:
        self.writing: _Writing | None = None

    def save(
        self,
        engine: Any,
        folder: Path,
        step: int,
        state: dict[str, Any],
        tensors: dict[str, torch.Tensor],
    ) -> None:
        """Begin folder/step_<step>, with everything that the next step depends on."""
        self.finish()
        final, unfinished = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
        request = _write(_sharded_state(engine, loading=False), unfinished, behind=True)
        self.writing = _Writing(unfinished, final, {"step": step, **state}, tensors, request)

    def poll(self) -> None:
        """Publish if every rank has written its part."""
        if self.writing is None:
            return
        busy = torch.tensor(int(self.writing.thread.is_alive()), device=device.device())
        dist.all_reduce(busy)
        if not busy:
            self.finish()

    def finish(self) -> None:
        """Wait, and publish."""
        if (done := self.writing) is None:
            return
        self.writing = None
        done.thread.join()
        failures = [f for f in parallel.gather_over_all([done.failure]) if f is not None]
        if failures:  # known to all ranks before they meet in what would not end
            raise _no_room(done.unfinished, failures[0])
        try:
            for finalize in done.request.finalize_fns:
                finalize()
            _publish(done.unfinished, done.final, done.state, done.checksums)
        except OSError as error:  # of rank 0, which ends the others with it
            raise _no_room(done.unfinished, error) from None
        if dist.get_rank() == 0:
            for old in complete(done.final.parent)[:-KEEP]:
                shutil.rmtree(old)
        dist.barrier()


def save_weights(engine: Any, folder: Path) -> None:
    """Write the weights alone, as megatron-core's distributed checkpoint."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    _write(_weights(engine), unfinished)
    _publish(unfinished, folder, {})


def load_weights(engine: Any, folder: Path) -> None:
    """Read what `save_weights` wrote, under any layout; UserError when it is damaged."""
    _load(folder, partial(_load_weights, engine))


def _load_weights(engine: Any, folder: Path) -> None:
    with torch.no_grad():
        _fill(engine, dist_checkpointing.load(_weights(engine), str(folder)))
    if engine.optimizer is not None:
        engine.optimizer.reload_model_params()


def _write(state: dict[str, Any], unfinished: Path, *, behind: bool = False) -> Any:
    """Into a fresh folder; `behind` only prepares that and returns the request for it."""
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    content = {k: v for k, v in _metadata().items() if k != "dp_cp_group"}
    try:
        return dist_checkpointing.save(
            state, str(unfinished), content_metadata=content,
            async_sharded_save=behind, async_strategy="mcore",
        )  # fmt: skip
    except OSError as error:
        raise _no_room(unfinished, error) from None


def _no_room(unfinished: Path, reason: object) -> UserError:
    return UserError(
        f"checkpoint {unfinished} could not be written ({reason}): free some disk space"
    )


def _publish(
    unfinished: Path, final: Path, state: dict[str, Any], known: dict[str, int] | None = None
) -> None:
    """known: checksums of this rank's own files."""
    dist.barrier()
    files = _checksums(unfinished, known or {})
    if dist.get_rank() == 0:
        (unfinished / "state.json").write_text(json.dumps({"files": files, **state}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
    dist.barrier()


def _checksums(folder: Path, known: dict[str, int]) -> dict[str, int]:
    """Of every file but state.json; the ranks share the reading of those that none knows."""
    checksums = dict(parallel.gather_over_all(list(known.items())))
    names = sorted(p.name for p in folder.iterdir() if p.name not in {"state.json", *checksums})
    shares = names[dist.get_rank() :: dist.get_world_size()]
    return checksums | dict(
        parallel.gather_over_all([(name, _crc(folder / name)) for name in shares])
    )


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def check_finite(chunks: list[Any], where: str, remedy: str = TOO_FAST) -> None:
    """Raise UserError on every rank where a weight of any rank is not finite."""
    weights = [p.detach() for chunk in chunks for p in chunk.parameters()]
    largest = torch.stack([torch.linalg.vector_norm(p, torch.inf).float() for p in weights])
    if not parallel.everywhere(bool(largest.isfinite().all())):
        raise UserError(f"{where} weights that are not finite: {remedy}")


def complete(folder: Path) -> list[Path]:
    """Published checkpoints, the lowest step first: names have six digits, or more."""
    steps = (p for p in folder.glob("step_*") if re.fullmatch(r"step_[0-9]+", p.name))
    return sorted(steps, key=lambda p: int(p.name.removeprefix("step_")))


def load_latest(engine: Any, folder: Path) -> tuple[int, dict[str, Any]] | None:
    """See `Engine.load_latest`."""
    steps = complete(folder)
    if not steps:
        return None
    state = _load(steps[-1], partial(_load_step, engine))
    tensors = steps[-1] / TENSORS
    return state.pop("step"), state | ({"tensors": load_file(tensors)} if tensors.exists() else {})


def _load(path: Path, read: Callable[[Path], None]) -> dict[str, Any]:
    """Check every file, read, return the state; UserError names what is damaged."""
    try:
        state = json.loads((path / "state.json").read_text())
        before, now = state.pop("files"), _checksums(path, {})
        wrong = [name for name, crc in before.items() if now.get(name) != crc]
        if wrong:
            raise ValueError(f"{wrong[0]} is not as it was written")
        read(path)
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"checkpoint {path} is damaged ({reason}): "
            "delete that folder to resume from the one before"
        ) from error
    return state


def _load_step(engine: Any, path: Path) -> None:
    with torch.no_grad():
        loaded = dist_checkpointing.load(_sharded_state(engine, loading=True), str(path))
        _fill(engine, loaded)
        engine.optimizer.load_state_dict(loaded["optimizer"])
    engine.schedule.load_state_dict(loaded["schedule"])
    rng = path / f"rng_{dist.get_rank()}.pt"
    if rng.exists():  # a rank that was not there before keeps the state of its seed
        torch.set_rng_state(torch.load(rng, weights_only=True)["torch"])


def _fill(engine: Any, loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded[f"model{i}" if len(engine.chunks) > 1 else "model"])
