"""Training checkpoints in megatron-core's distributed format: a cut save never shadows a good one.

A checkpoint holds weights, optimizer, schedule, random state and the stage's own state (position in
the data, controllers). It is written beside its final name and published by one rename.
"""

import json
import os
import queue
import re
import shutil
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


def _sharded_state(engine: Any, *, loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    state: dict[str, Any] = {}
    for i, chunk in enumerate(engine.chunks):
        name = f"model{i}" if len(engine.chunks) > 1 else "model"
        state[name] = chunk.sharded_state_dict(metadata=metadata)
    models = {k: v for k, v in state.items() if k.startswith("model")}
    optimizer = engine.optimizer.sharded_state_dict(
        models if len(models) > 1 else models["model"], is_loading=loading, metadata=metadata
    )
    return {**state, "optimizer": optimizer, "schedule": engine.schedule.state_dict()}


def save(engine: Any, folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write folder/step_<step> with everything the next step depends on."""
    final, partial = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    content = {k: v for k, v in _metadata().items() if k != "dp_cp_group"}
    try:
        dist_checkpointing.save(
            _sharded_state(engine, loading=False), str(partial), content_metadata=content
        )
    except OSError as error:
        raise UserError(
            f"checkpoint {partial} could not be written ({error}): free some disk space"
        ) from None
    rng = {"torch": torch.get_rng_state()}
    torch.save(rng, partial / f"rng_{dist.get_rank()}.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / "state.json").write_text(json.dumps({"step": step, **state}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in complete(folder)[:-KEEP]:
            shutil.rmtree(old)
    dist.barrier()


def complete(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name))


def load_latest(engine: Any, folder: Path) -> tuple[int, dict[str, Any]] | None:
    found = complete(folder)
    if not found:
        return None
    path = found[-1]
    try:
        with torch.no_grad():
            loaded = dist_checkpointing.load(_sharded_state(engine, loading=True), str(path))
        for i, chunk in enumerate(engine.chunks):
            chunk.load_state_dict(loaded[f"model{i}" if len(engine.chunks) > 1 else "model"])
        with torch.no_grad():
            engine.optimizer.load_state_dict(loaded["optimizer"])
        engine.schedule.load_state_dict(loaded["schedule"])
        rng = path / f"rng_{dist.get_rank()}.pt"
        if rng.exists():  # a rank that was not there before keeps the state of its seed
            torch.set_rng_state(torch.load(rng, weights_only=True)["torch"])
        state = json.loads((path / "state.json").read_text())
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"checkpoint {path} is damaged ({reason}): "
            "delete that folder to resume from the one before"
        ) from error
    return state.pop("step"), state
