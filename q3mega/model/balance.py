"""The load-balancing loss of a mixture's routers, the same under every layout.

A layer's loss is E * sum over its E experts of f * P (Switch Transformer, 2101.03961), 1 where all
is even. As in Qwen3's balance over the global batch (2501.11873) both are of a whole optimizer
step: P is the mean probability that its tokens give the expert, f the share of their choices that
went to it, without a gradient. P is a sum over tokens, so any split into micro-batches and ranks
adds up to it. f has to be known before the first backward pass: a forward pass over the step counts
it, or else the last step's is taken, which costs nothing and lags. Padding and fillers count in
neither.
"""

from q3mega import device

# isort: split
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor


class Balance:
    """What the routers of an engine share.

    choices: (layers, experts) int64 of all ranks' tokens in the last step; None before the first.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.choices: Tensor | None = None
        self.shares = torch.empty(0)  # (layers, experts) fp32: E * f
        self.scale: float | None = None  # of a token's loss, during a step
        self.counts = torch.empty(0)  # of this step and rank, as `choices`
        self.losses = torch.empty(0)  # (layers,) fp64, their sum over this step's tokens here
        self.tokens = 0

    @contextmanager
    def step(self, tokens: int, divisor: int) -> Iterator[None]:
        """Passes over a step's tokens, of all ranks, whose gradient is then divided by divisor."""
        layers, experts = self.config.num_layers, self.config.num_moe_experts
        here = device.device()
        self.counts = torch.zeros(layers, experts, dtype=torch.int64, device=here)
        self.losses = torch.zeros(layers, dtype=torch.float64, device=here)
        self.tokens = max(tokens, 1)
        self.scale = self.config.moe_aux_loss_coeff * divisor / self.tokens
        try:
            yield
        finally:
            self.scale = None

    def count(self, layer: int, chosen: Tensor, real: Tensor) -> None:
        """Experts (T, topk) that a router chose by itself; real (T,) bool: not padding."""
        if self.scale is not None:
            taken = real.new_zeros(len(real), self.counts.shape[1]).scatter_(1, chosen, True)
            self.counts[layer] += (taken & real[:, None]).sum(0)

    def attach(self, layer: int, logits: Tensor, real: Tensor) -> Tensor:
        """The router's logits (T, E), whose backward pass adds this loss's gradient."""
        if self.scale is None or not torch.is_grad_enabled():  # to be recomputed in the backward
            return logits
        even = logits.float().softmax(-1) @ self.shares[layer]
        loss = torch.where(real, even, 0.0).sum()
        self.losses[layer] += loss.detach()
        return MoEAuxLossAutoScaler.apply(logits, loss * self.scale)

    def close(self) -> dict[str, float]:
        """The step's choices become the last ones; all ranks call.

        Returns `balance`, the loss as its layers' mean, and `expert_load`, the busiest expert's
        tokens over the mean of its layer.
        """
        total = torch.cat([self.counts.double(), self.losses[:, None]], 1)
        dist.all_reduce(total)
        self._follow(total[:, :-1].long())
        loss = float(total[:, -1].mean()) / self.tokens
        return {"router_aux_loss": loss, "expert_load": float(self.shares.max())}

    def restore(self, choices: list[list[int]] | None) -> None:
        """Go on from the `choices` of a checkpoint; None: as before the first step."""
        if choices is None:
            self.choices = None
        else:
            self._follow(torch.tensor(choices, device=device.device()))

    def _follow(self, choices: Tensor) -> None:
        self.choices = choices
        mean = choices.double().mean(1, keepdim=True)
        self.shares = (choices / mean.clamp(min=1e-9)).float()
