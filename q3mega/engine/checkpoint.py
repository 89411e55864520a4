"""Training checkpoints in megatron-core's distributed format: a cut save never shadows a good one.

A checkpoint holds weights, optimizer, schedule, random state and the stage's own state (position in
the data, controllers). It is written beside its final name and published by one rename; every
file's checksum stands in its state.json. It loads under any layout.
"""

import json
import os
import queue
import re
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from q3mega import device  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from q3mega.engine import parallel
from q3mega.errors import UserError

KEEP = 2
# saves here are synchronous, in threads: without this, a manager process is started for the queue
filesystem_async._results_queue = queue.Queue()


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


def save(engine: Any, folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write folder/step_<step> with everything the next step depends on."""
    final, unfinished = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    _write(_sharded_state(engine, loading=False), unfinished)
    rng = {"torch": torch.get_rng_state()}
    torch.save(rng, unfinished / f"rng_{dist.get_rank()}.pt")
    _publish(unfinished, final, {"step": step, **state})
    if dist.get_rank() == 0:
        for old in complete(folder)[:-KEEP]:
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


def _write(state: dict[str, Any], unfinished: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    content = {k: v for k, v in _metadata().items() if k != "dp_cp_group"}
    try:
        dist_checkpointing.save(state, str(unfinished), content_metadata=content)
    except OSError as error:
        raise UserError(
            f"checkpoint {unfinished} could not be written ({error}): free some disk space"
        ) from None


def _publish(unfinished: Path, final: Path, state: dict[str, Any]) -> None:
    dist.barrier()
    files = _checksums(unfinished)
    if dist.get_rank() == 0:
        (unfinished / "state.json").write_text(json.dumps({"files": files, **state}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
    dist.barrier()


def _checksums(folder: Path) -> dict[str, int]:
    """Of every file but state.json; the ranks share the reading."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "state.json")
    mine = names[dist.get_rank() :: dist.get_world_size()]
    return dict(parallel.gather_over_all([(name, _crc(folder / name)) for name in mine]))


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def complete(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name))


def load_latest(engine: Any, folder: Path) -> tuple[int, dict[str, Any]] | None:
    found = complete(folder)
    if not found:
        return None
    state = _load(found[-1], partial(_load_step, engine))
    return state.pop("step"), state


def _load(path: Path, read: Callable[[Path], None]) -> dict[str, Any]:
    """Check every file, read, return the state; UserError names what is damaged."""
    try:
        state = json.loads((path / "state.json").read_text())
        before, now = state.pop("files"), _checksums(path)
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
