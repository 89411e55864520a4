"""The one currency: a packed Batch of documents feeds every loss; a Sample is one of its documents.

Columns are per token and travel together, so that advantages, old log-probabilities or teacher
scores reach the loss beside the tokens they belong to.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from q3mega._data import best_fit_pack


@dataclass
class Sample:
    """One sequence. weights[i] is the loss weight of *predicting* tokens[i] (0: prompt, padding).

    columns: further per-token numbers, or (T, K) tensors of them, with the alignment of weights.
    """

    tokens: list[int]
    weights: list[float]
    columns: Mapping[str, list[float] | Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Batch:
    """Packed documents, ready for a forward pass. T tokens, B documents.

    tokens, targets (T,) int64: targets are the next token, within each document.
    loss_weights (T,) fp32: mask times normaliser; a document's last position weighs 0.
    cu_seqlens (B + 1,) int32: document borders.
    columns: name -> (T,) or (T, K), aligned with targets: fp32, or uint8 where samples' are.
    filler: keeps ranks in step with others that have more; without weight, and in no statistics.
    """

    tokens: Tensor
    targets: Tensor
    loss_weights: Tensor
    cu_seqlens: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    filler: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def seq_ids(self) -> Tensor:
        """(T,) int64, the document of each token."""
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def at(self, index: Tensor, length: int) -> "Batch":
        """The same tokens at places (T,) of a pack of `length`; zeros without weight elsewhere.

        The borders are the caller's to set.
        """

        def spread(column: Tensor) -> Tensor:
            return column.new_zeros(length, *column.shape[1:]).index_copy_(0, index, column)

        return self._each(spread, self.cu_seqlens)

    def take(self, index: Tensor, cu_seqlens: Tensor) -> "Batch":
        """The tokens at `index`, with borders of their own."""
        return self._each(lambda column: column[index], cu_seqlens)

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        if self.tokens.device == device:
            return self
        return self._each(lambda column: column.to(device), self.cu_seqlens.to(device))

    def _each(self, change: Callable[[Tensor], Tensor], cu_seqlens: Tensor) -> "Batch":
        columns = {name: change(column) for name, column in self.columns.items()}
        return Batch(
            change(self.tokens),
            change(self.targets),
            change(self.loss_weights),
            cu_seqlens,
            columns,
            self.filler,
        )

    def as_filler(self) -> "Batch":
        """The batch without loss weight, for ranks and pipelines that need one more."""
        return replace(self, loss_weights=torch.zeros_like(self.loss_weights), filler=True)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack samples, in order, into one Batch."""
    lengths = np.array([len(s) for s in samples])
    ends = np.cumsum(lengths)
    tokens = torch.tensor([t for s in samples for t in s.tokens])

    def shifted(values: Iterable[list[float] | Tensor]) -> Tensor:
        column = torch.cat([_numbers(v) for v in values]).roll(-1, 0)
        column[ends - 1] = 0
        return column

    targets = tokens.roll(-1)
    targets[ends - 1] = 0
    names = samples[0].columns
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=shifted(s.weights for s in samples),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        columns={n: shifted(s.columns[n] for s in samples) for n in names},
    )


def _numbers(values: list[float] | Tensor) -> Tensor:
    if isinstance(values, Tensor) and values.dtype == torch.uint8:
        return values
    return torch.as_tensor(values, dtype=torch.float32)


def pack(samples: Sequence[Sample], capacity: int) -> list[Batch]:
    """Best-fit packing of samples into batches of at most `capacity` tokens, none of them cut: a
    longer one, as a conversation with a tool may become, sets the capacity."""
    if not samples:
        return []
    capacity = max(capacity, *map(len, samples))
    bins = best_fit_pack(np.array([len(s) for s in samples], dtype=np.int64), capacity)
    return [collate([samples[i] for i in sorted(b.tolist())]) for b in bins]
