"""Which experts each token takes: recorded from a model's routers, or replayed into them.

Routing replay (R2 of arXiv 2507.18071, R3 of 2510.11370): only the choice of experts is replayed.
Their gates are the softmax over the chosen ones of the router's present logits, so that it learns.

Routes are a column of a batch, (T, layers * topk): expert + 1, and 0 where the router chooses by
itself: a token that nobody has routed, and all padding.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from q3mega.model.balance import Balance

ROUTED_EXPERTS = "routes"


class Routing:
    """What all routers of an engine share.

    given: (tokens held here, layers, topk) of the micro-batch in its forward pass. real (tokens
    held here,): which of them are no padding. recorded: what each layer's router chose by itself,
    (tokens held here, topk) a pass; None: not asked for.
    """

    def __init__(self, experts: int, topk: int, balance: Balance | None) -> None:
        self.topk, self.balance = topk, balance
        self.dtype = torch.uint8 if experts < 256 else torch.int32
        self.routers: list[_Router] = []
        self.forward = False  # else a router that is called is recomputed in the backward
        self.recomputes = False
        self.given: Tensor | None = None
        self.real: Tensor | None = None
        self.recorded: dict[int, list[Tensor]] | None = None

    def attach(self, chunks: Sequence[Any]) -> None:
        """Stand in the place that megatron's own replay has in the routers of a model's parts: that
        one keeps a single list of the routers of all models in a process."""
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                self.routers.append(_Router(layer.layer_number - 1, self))
                layer.mlp.router.router_replay = self.routers[-1]

    @contextmanager
    def replaying(self, routes: Tensor | None, real: Tensor | None = None) -> Iterator[None]:
        """One forward pass over a micro-batch with (tokens held here, layers * topk) routes."""
        self.given = None if routes is None else routes.unflatten(1, (-1, self.topk))
        self.real = real
        self.forward = True
        try:
            yield
        finally:
            self.given, self.real, self.forward = None, None, False

    def begin(self, *, recomputes: bool) -> None:
        """Forward passes come next, and with `recomputes` each router again in the backward."""
        self.recomputes = recomputes
        for router in self.routers:
            router.waiting.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Passes in which every router's own choice is kept for `passes`."""
        before, self.recorded = self.recorded, {}
        try:
            yield
        finally:
            self.recorded = before

    def passes(self) -> list[dict[int, Tensor]]:
        """What was recorded since the last call: of each pass, layer -> (tokens held here, topk),
        as in a column of routes."""
        assert self.recorded is not None
        recorded, self.recorded = self.recorded, {}
        rows = zip(*recorded.values(), strict=True)
        return [dict(zip(recorded, row, strict=True)) for row in rows]


class _Router:
    """The choice of one router."""

    def __init__(self, layer: int, routing: Routing) -> None:
        self.layer, self.routing = layer, routing
        # A stage's backward passes come in the order of its forward passes, in every schedule.
        self.waiting: deque[tuple[Tensor | None, Tensor | None]] = deque()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores (T, topk) and experts (T, topk) int64 that each token takes, of scores (T, E)."""
        routes, real = self._of_these_tokens()
        balance = self.routing.balance
        if balance and real is not None:
            scores = balance.attach(self.layer, scores, real)
        values, chosen = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if balance and real is not None and self.routing.forward:
            balance.count(self.layer, chosen, real)
        recorded = self.routing.recorded
        if recorded is not None:
            recorded.setdefault(self.layer, []).append((chosen + 1).to(self.routing.dtype))
        if routes is None:
            return values, chosen
        routes = routes.to(chosen)  # ids are exact in whatever type they come
        taken = torch.where(routes > 0, routes - 1, chosen)
        return scores.gather(1, taken), taken

    def _of_these_tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """The routes of the tokens in this call, and which of them are real."""
        routing = self.routing
        if not routing.forward:
            return self.waiting.popleft() if self.waiting else (None, None)
        given = routing.given
        columns = None if given is None else given[:, self.layer], routing.real
        if routing.recomputes:
            self.waiting.append(columns)
        return columns


def as_column(routes: Tensor) -> Tensor:
    """(T, layers * topk) column of a sample of T tokens, from the routes of its first T - 1: a row
    stands at the token that it leads to, as all columns do."""
    return torch.cat([routes.new_zeros(1, routes.shape[1]), routes])


def continued(earlier: Tensor | None, later: Tensor | None) -> Tensor | None:
    """Routes of a sequence that was sampled in two calls, of which the later one fed all of it
    again: a token keeps those under which the next one was sampled."""
    if earlier is None or later is None:
        return later
    return torch.cat([earlier, later[len(earlier) :]])


def differing(a: Tensor, b: Tensor, topk: int) -> tuple[int, int]:
    """(how many of the experts in `a` are not in `b`, of how many) where both are known; both
    (T, layers * topk) of routes."""
    a, b = (x.unflatten(-1, (-1, topk)) for x in (a, b))
    known = (a[..., 0] > 0) & (b[..., 0] > 0)
    missed = (a[..., :, None] != b[..., None, :]).all(-1)
    return int(missed[known].sum()), int(known.sum()) * topk
