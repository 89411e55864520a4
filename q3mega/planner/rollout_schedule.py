"""How fast rollouts and updates go together: a simulation of servers beside a trainer.

A server decodes all its sequences in step, one token each; new ones enter as others end. Batches
begin when the schedule lets them (q3mega.train.schedule), the trainer learns from them in order,
and new weights stop all servers for a moment. Times are given: measured ones, or those
of q3mega.planner.cost.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache


@dataclass(frozen=True)
class Rates:
    """decode: seconds of a step in which a server decodes n sequences. servers: how many, each with
    `slots` for sequences at once. train, sync: seconds of a batch's updates, and of handing over
    weights.
    """

    decode: Callable[[int], float]
    servers: int
    slots: int
    train: float
    sync: float


@dataclass
class _Server:
    """clock: tokens that a sequence which was always here has decoded; ends: (clock, batch)."""

    clock: float = 0.0
    ends: list[tuple[float, int]] = field(default_factory=list)


def finish_times(rates: Rates, lengths: Sequence[Sequence[int]], staleness: int) -> list[float]:
    """Seconds at which each batch's updates end; lengths: tokens of each batch's sequences.

    staleness 0 is the synchronous schedule.
    """
    decode = cache(rates.decode)
    servers = [_Server() for _ in range(rates.servers)]
    queue: deque[tuple[int, int]] = deque()  # (batch, length)
    left = Counter({k: len(batch) for k, batch in enumerate(lengths)})
    now, begun = 0.0, 0
    done: list[float] = []
    until: float | None = None  # the trainer's end of what it does
    while len(done) < len(lengths):
        while begun < len(lengths) and begun <= len(done) + staleness:
            queue.extend((begun, length) for length in lengths[begun])
            begun += 1
        _admit(servers, queue, rates.slots)
        if until is None and not left[len(done)]:
            until = now + rates.train
        at = [now + (s.ends[0][0] - s.clock) * decode(len(s.ends)) for s in servers if s.ends]
        then = min(at + ([] if until is None else [until]))
        for server in servers:
            if server.ends:
                server.clock += (then - now) / decode(len(server.ends))
            while server.ends and server.ends[0][0] <= server.clock + 1e-6:
                left[heapq.heappop(server.ends)[1]] -= 1
        now = then
        if until is not None and now >= until:
            now, until = now + rates.sync, None
            done.append(now)
    return done


def _admit(servers: list[_Server], queue: deque[tuple[int, int]], slots: int) -> None:
    """Into free slots, in order, each where the fewest are under way."""
    free = [(len(s.ends), i) for i, s in enumerate(servers) if len(s.ends) < slots]
    heapq.heapify(free)
    while queue and free:
        busy, i = heapq.heappop(free)
        batch, length = queue.popleft()
        heapq.heappush(servers[i].ends, (servers[i].clock + length, batch))
        if busy + 1 < slots:
            heapq.heappush(free, (busy + 1, i))


def pace(times: Sequence[float]) -> float:
    """Seconds a batch: of the third quarter, when the line is full and does not yet drain."""
    first, last = len(times) // 2 - 1, len(times) * 3 // 4 - 1
    return (times[last] - times[first]) / (last - first)
