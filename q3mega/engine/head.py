"""The lm_head as a loss or a sampler sees it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from q3mega.ops import vocab


@dataclass
class LMHead:
    """What a loss sees: final hidden states (T, H), lm_head weight (V / TP, H), its TP group, and
    the group over which the documents of the batch are cut.

    valid_vocab: ids that the tokenizer has; rows of the lm_head from there on stand for nothing.
    """

    hidden: Tensor
    weight: Tensor
    tp_group: dist.ProcessGroup | None
    cp_group: dist.ProcessGroup | None = None
    valid_vocab: int | None = None

    def logits(self) -> Tensor:
        """(T, ids) fp32, of the whole vocabulary: for a few rows to sample from or to compare."""
        shard = (self.hidden @ self.weight.T).float()
        if self.tp_group is None:
            return shard[:, : self.valid_vocab]
        shards = [torch.empty_like(shard) for _ in range(self.tp_group.size())]
        dist.all_gather(shards, shard, group=self.tp_group)
        return torch.cat(shards, -1)[:, : self.valid_vocab]

    def rows(self, ids: Tensor) -> Tensor:
        """(n, H) the lm_head's rows of the ids, whichever rank holds them; differentiable."""
        index = ids - vocab.shard_offset(self.weight, self.tp_group)
        held = ((index >= 0) & (index < len(self.weight)))[:, None]
        local_rows = self.weight[index.clamp(0, len(self.weight) - 1)]
        return vocab.reduce_from_tp_region(torch.where(held, local_rows, 0.0), self.tp_group)
