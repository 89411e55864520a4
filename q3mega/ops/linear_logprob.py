"""Log-probability of targets, and entropy, from hidden states: the lm_head without its logits."""

import torch.distributed as dist
from torch import Tensor

from q3mega.ops import vocab
from q3mega.ops.dispatch import register, resolve


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token log p(target) and entropy in nats, both (N,) fp32 and differentiable.

    hidden (N, H); weight (V, H), or with `tp_group` the rank's equal shard of it; targets (N,)
    int64, global ids. temperature divides the logits. Raises ValueError for a temperature that is
    not positive or shapes that do not fit.
    """
    check(hidden, weight, targets, temperature)
    return resolve("linear_logprob", backend)(
        hidden, weight, targets, temperature, valid_vocab, tp_group
    )


def check(hidden: Tensor, weight: Tensor, rows: Tensor, temperature: float) -> None:
    """Raise ValueError on what no lm-head operator can take."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if hidden.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(hidden) != len(rows):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and per-token arguments "
            f"{tuple(rows.shape)} do not fit: need (N, H), (V, H) and (N, ...)"
        )


@register("linear_logprob", "reference")
def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    valid_vocab: int | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    def rows(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logp = vocab.log_probs(h, weight, temperature, valid_vocab, group)
        entropy = -vocab.total((logp.exp() * logp).sum(-1), group)
        return vocab.pick(logp, y[:, None], weight, group)[:, 0], entropy

    logprob, entropy = vocab.by_rows(rows, (hidden, targets), len(weight))
    return logprob, entropy
