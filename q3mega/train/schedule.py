"""When rollout batches are sampled: in turn with the updates, or on servers beside them.

Every schedule draws the same prompts into the same batches and learns from the batches in their
order, so a short answer is never learnt from sooner than a long one. What differs is `staleness`:
how many batches' updates may lie between the weights that begin a batch and those that learn
from it.
"""

import threading
from collections.abc import Callable, Container
from concurrent.futures import Future
from typing import Protocol

import torch.distributed as dist

from q3mega.engine import parallel
from q3mega.rollout.weight_sync.sampler import InterruptibleSampler
from q3mega.train.rollouts import Batches, Rollout

RollOut = Callable[[int], list[Rollout]]
Begin = Callable[[int], None]


class Schedule(Protocol):
    """All ranks call it in the same order and get the same."""

    def advance(
        self, step: int, last: int, updates: int, ready: Container[int], begin: Begin
    ) -> Batches:
        """Before the updates of `step`: begin what may be begun, up to batch `last` and without
        those that are `ready`; return what is finished, the batch of `step` among it.

        updates: that the weights have seen, a batch's version. begin: is told each batch first, on
        rank 0.
        """
        ...

    def finished(self) -> Batches:
        """What has come to its end since, to go into a checkpoint."""
        ...


class InTurn:
    """The ranks sample, then learn. staleness 0 is the synchronous schedule, 1 is one step off.

    roll_out: samples and scores this data-parallel rank's prompts of a step.
    """

    def __init__(self, roll_out: RollOut, staleness: int = 0) -> None:
        self.roll_out, self.staleness = roll_out, staleness

    def advance(
        self, step: int, last: int, updates: int, ready: Container[int], begin: Begin
    ) -> Batches:
        """See `Schedule`."""
        missing = [s for s in _window(step, self.staleness, last) if s not in ready]
        for s in missing:
            begin(s)
        found = {s: parallel.gather_over_data(self.roll_out(s)) for s in missing}
        for rollout in (r for batch in found.values() for r in batch):
            rollout.versions = [updates]
        return found

    def finished(self) -> Batches:
        """See `Schedule`."""
        return {}


class Beside:
    """Asynchronous: rank 0 has servers sample in the background while all ranks learn.

    Before each batch's updates the servers get the newest weights. Sequences under way go on under
    them, and each token keeps the version that sampled it, and its log-probability.
    roll_out: samples and scores all prompts of a step, in a thread, without the other ranks.
    """

    def __init__(self, sampler: InterruptibleSampler, roll_out: RollOut, staleness: int) -> None:
        self.sampler, self.roll_out, self.staleness = sampler, roll_out, staleness
        self.under_way: dict[int, Future[list[Rollout]]] = {}  # on rank 0
        self.updates: dict[str, int] = {}  # of a version

    def advance(
        self, step: int, last: int, updates: int, ready: Container[int], begin: Begin
    ) -> Batches:
        """See `Schedule`."""
        self.updates[self.sampler.sync()] = updates
        if dist.get_rank() == 0:
            for s in _window(step, self.staleness, last):
                if s not in ready and s not in self.under_way:
                    begin(s)
                    self.under_way[s] = _in_background(self.roll_out, s)
        return self._collect(step)

    def finished(self) -> Batches:
        """See `Schedule`."""
        return self._collect(None)

    def _collect(self, awaited: int | None) -> Batches:
        done = [s for s, batch in self.under_way.items() if s == awaited or batch.done()]
        found = [(s, self.under_way.pop(s).result()) for s in sorted(done)]
        batches = dict(parallel.gather_over_all(found))
        for rollout in (r for batch in batches.values() for r in batch):
            sampled_by = (version for version, _ in rollout.completion.weight_versions)
            rollout.versions = sorted({self.updates[version] for version in sampled_by})
        return batches


def _window(step: int, staleness: int, last: int) -> range:
    return range(step, min(step + staleness, last) + 1)


def _in_background(roll_out: RollOut, step: int) -> "Future[list[Rollout]]":
    """In a thread that a failing run does not wait for."""
    future: Future[list[Rollout]] = Future()

    def run() -> None:
        try:
            future.set_result(roll_out(step))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
