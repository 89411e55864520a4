"""A process that is asked to stop, by SIGUSR1 or SIGTERM: within a loop of steps it saves after the
step that it is at; elsewhere, where nothing would be saved, it ends at once."""

import signal
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist

from q3mega import device
from q3mega.errors import Stopped


class _State:
    requested = False
    in_steps = False


def listen() -> None:
    """Take the two signals from here on. `Stopped` is raised where a loop may be left."""

    def request(number: int, frame: FrameType | None) -> None:
        _State.requested = True
        if not _State.in_steps:
            raise Stopped

    for which in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(which, request)


def steps(
    first: int, last: int, every: int, save: Callable[[int], None], finish: Callable[[], None]
) -> Iterator[int]:
    """first..last; saves after each `every`-th, after the last, and after that in which any rank
    was asked to stop: then it waits for the save by `finish` and raises Stopped. All ranks call."""
    _State.in_steps = True
    try:
        for step in range(first, last + 1):
            yield step
            stop = _anyone(_State.requested)
            if stop or step % every == 0 or step == last:
                save(step)
            if stop:
                finish()
                raise Stopped
    finally:
        _State.in_steps = False


def _anyone(requested: bool) -> bool:
    flag = torch.tensor(int(requested), device=device.device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
