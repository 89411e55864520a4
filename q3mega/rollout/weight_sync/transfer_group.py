"""The process group through which a trainer's weights reach the processes of servers.

Torch alone: this is imported inside the servers, too.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

TRANSFER_TIMEOUT = timedelta(seconds=120)  # until all have joined the group, and for each bucket


def join(store: dist.Store, rank: int, world: int, name: str, backend: str) -> dist.ProcessGroup:
    """Rank 0 is the trainer's. Beside the default group, as SGLang makes its own: all members find
    the same keys in the store."""
    group, _ = _new_process_group_helper(
        world, rank, [], dist.Backend(backend), dist.PrefixStore(name, store),
        group_name=dist.GroupName(name), timeout=TRANSFER_TIMEOUT,
    )  # fmt: skip
    _world.pg_group_ranks[group] = {i: i for i in range(world)}  # or it could not be destroyed
    return group


def receive(
    group: dist.ProcessGroup,
    dtypes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    device: torch.device,
) -> list[Tensor]:
    """The tensors that rank 0 broadcasts next. Raises RuntimeError when it is gone."""
    tensors = [
        torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for dtype, shape in zip(dtypes, shapes, strict=True)
    ]
    for work in [group.broadcast(tensor, 0) for tensor in tensors]:
        work.wait()
    return tensors
