"""The parallel layout: process groups from a recipe's layout, each rank's part of a micro-batch,
and sums over data-parallel ranks.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from q3mega import device

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from torch import Tensor

from q3mega.config.layout import Layout, launched
from q3mega.data.batch import Batch, Sample, collate, pack
from q3mega.engine import megatron_patches
from q3mega.errors import UserError
from q3mega.ops import context_parallel

_T = TypeVar("_T")
_Item = TypeVar("_Item")
# Ranks wait for the one that prepares data, and for those that sample longest; a dead one is seen
# at once by whoever started it.
PATIENCE = timedelta(hours=6)
ARRIVAL = timedelta(minutes=15)  # of the ranks, which are started together


def initialise(layout: Layout, seed: int) -> None:
    """Join the process group that torchrun describes (or be alone), cut it as the layout says."""
    megatron_patches.apply()
    if not dist.is_initialized():
        _join(layout.processes)
    if not ps.model_parallel_is_initialized():
        virtual = layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ps.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            distributed_timeout_minutes=PATIENCE // timedelta(minutes=1),
            create_gloo_process_groups=False,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)


def _join(processes: int) -> None:
    """One process is alone, whatever a pod or a shell has left in its environment; under torchrun
    it is one of torchrun's."""
    store: dist.Store = dist.HashStore()
    rank = local_rank = 0
    size = launched() if processes > 1 or "TORCHELASTIC_RUN_ID" in os.environ else 1
    if processes not in (1, size):
        raise UserError(
            f"layout.processes={processes}, and {size} were started: start them by q3mega run, "
            "q3mega slurm or torchrun"
        )
    if size > 1:
        try:
            store, rank, _ = next(dist.rendezvous("env://", timeout=ARRIVAL))
        except dist.DistStoreError as error:
            raise UserError(
                f"WORLD_SIZE={size}, and not all of them came within "
                f"{ARRIVAL // timedelta(minutes=1)} minutes ({str(error).splitlines()[0]}); "
                "without a launcher unset RANK and WORLD_SIZE"
            ) from None
        store.set_timeout(PATIENCE)
        local_rank = int(os.environ["LOCAL_RANK"])
    if device.HAS_GPU:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        device.BACKEND, store=store, rank=rank, world_size=size, timeout=PATIENCE
    )


def config_fields(layout: Layout, layers: int) -> dict[str, Any]:
    """The layout in TransformerConfig's words, for a model of so many layers."""
    ends = layout.count_embedding_and_head_as_layers(layers)
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "sequence_parallel": layout.sequence_parallel,
        "variable_seq_lengths": layout.pipeline > 1,  # packed micro-batches differ in length
        "account_for_embedding_in_pipeline_split": ends,
        "account_for_loss_in_pipeline_split": ends,
    }
    if layout.recompute == "full":
        fields["recompute_granularity"] = "full"
        fields |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    elif layout.recompute != "none":
        modules = {"norms": ["layernorm"], "experts": ["layernorm", "moe"]}
        fields["recompute_granularity"] = "selective"
        fields["recompute_modules"] = modules[layout.recompute]
    if layout.virtual_pipeline > 1:
        fields["virtual_pipeline_model_parallel_size"] = layout.virtual_pipeline
        # with the default flags an interleaved pipeline of two stages is silently wrong
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return fields


@dataclass
class ContextShard:
    """This rank's part of a micro-batch, whose documents context parallelism cuts over ranks.

    batch: the tokens held here, borders among them. cu_seqlens: the borders of the whole pack, in
    which documents are filled up so that they can be cut, and the whole so that sequence
    parallelism can cut it. place (T,): where the whole holds the tokens of `original`. real: which
    of the tokens held here are some of these, not filling.
    """

    original: Batch
    batch: Batch
    cu_seqlens: Tensor
    place: Tensor
    real: Tensor

    def to(self, device: torch.device) -> "ContextShard":
        """The shard on another device."""
        batches = self.original.to(device), self.batch.to(device)
        return ContextShard(
            *batches, *(x.to(device) for x in (self.cu_seqlens, self.place, self.real))
        )

    def as_filler(self) -> "ContextShard":
        """The shard without loss weight."""
        batches = self.original.as_filler(), self.batch.as_filler()
        return ContextShard(*batches, self.cu_seqlens, self.place, torch.zeros_like(self.real))

    def whole(self, hidden: Tensor) -> Tensor:
        """(T, ...) of all the original's tokens from what each rank has of its own. No gradient."""
        if _context_size() > 1:
            group = ps.get_context_parallel_group()
            (hidden,) = context_parallel.gather((hidden,), self.cu_seqlens, group)
        return hidden[self.place.to(hidden.device)]


def shard_for_context_parallel(
    batch: Batch, *, sequence_parallel: bool, multiple: int = 1
) -> ContextShard:
    """Cut a micro-batch, the same on all ranks of a context- or tensor-parallel group.

    multiple: of each rank's number of tokens.
    """
    size = _context_size()
    document = 2 * size if size > 1 else 1
    ways = ps.get_tensor_model_parallel_world_size() if sequence_parallel else 1
    lengths = batch.cu_seqlens.diff().long()
    filled = (lengths + document - 1) // document * document
    end = torch.cat([filled.new_zeros(1), filled.cumsum(0)])
    row = torch.repeat_interleave(end[:-1] - batch.cu_seqlens[:-1], lengths)
    positions = row + torch.arange(len(batch), device=row.device)
    padding = -int(end[-1]) % math.lcm(document, size * ways * multiple)
    if padding:
        end = torch.cat([end, end[-1:] + padding])
    end = end.to(batch.cu_seqlens.dtype)
    spread = batch.at(positions, int(end[-1]))
    rank = ps.get_context_parallel_rank()
    held = context_parallel.zigzag(end, rank, size) if size > 1 else torch.arange(len(spread))
    held = held.to(positions.device)
    real = torch.zeros(len(spread), dtype=torch.bool, device=positions.device)
    real[positions] = not batch.filler
    return ContextShard(batch, spread.take(held, end // size), end, positions, real[held])


@dataclass
class Count:
    """Tokens of a step on all ranks. held: with filling and fillers, as context-parallel ranks hold
    them. documents: those of documents alone."""

    held: int
    documents: int


def in_step(
    parts: list[ContextShard], spare: Callable[[], ContextShard], multiple: int
) -> tuple[list[ContextShard], Count]:
    """As many micro-batches on every rank, a multiple of `multiple`, by fillers at the end.

    spare: makes one for a rank that has none.
    """
    documents = sum(len(p.original) for p in parts if not p.original.filler)
    sizes = len(parts), sum(len(p.batch) for p in parts), documents
    here = torch.tensor(sizes, device=device.device())
    counts = [here.clone() for _ in range(data_size())]
    if len(counts) > 1:
        dist.all_gather(counts, here, group=data_group())
    most = max(int(c[0]) for c in counts)
    most = -(-most // multiple) * multiple
    held, documents = (sum(int(c[i]) for c in counts) for i in (1, 2))
    filler = (parts[0] if parts else spare()).as_filler()
    fillers = [filler] * (most - len(parts))
    if most * len(counts) > sum(int(c[0]) for c in counts):  # they are held, too
        extra = torch.tensor(len(fillers) * len(filler.batch), device=device.device())
        dist.all_reduce(extra, group=data_group())
        held += int(extra)
    return [*parts, *fillers], Count(held * _context_size(), documents)


def everywhere(flag: bool) -> bool:
    """Whether it holds on every rank."""
    if dist.get_world_size() == 1:
        return flag
    holds = torch.tensor(int(flag), device=device.device())
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds)


def _context_size() -> int:
    return ps.get_context_parallel_world_size()


def data_group() -> dist.ProcessGroup:
    """The process group of the data-parallel ranks, which hold this rank's part of the model."""
    return ps.get_data_parallel_group()


def data_rank() -> int:
    """This rank's number among its data-parallel ranks, from 0."""
    return ps.get_data_parallel_rank()


def data_size() -> int:
    """How many data-parallel ranks there are."""
    return ps.get_data_parallel_world_size()


def sum_over_data(values: dict[str, float], config: Any) -> dict[str, float]:
    """Sums over data- and context-parallel ranks, then known to every pipeline stage."""
    if dist.get_world_size() == 1:
        return values
    box: list[Any] = [sorted(values)]  # one order of keys everywhere
    last = ps.get_pipeline_model_parallel_last_rank()
    if config.pipeline_model_parallel_size > 1:
        dist.broadcast_object_list(box, last, group=ps.get_pipeline_model_parallel_group())
    total = torch.tensor(
        [values.get(n, 0.0) for n in box[0]], dtype=torch.float64, device=device.device()
    )
    dist.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
    if config.pipeline_model_parallel_size > 1:
        dist.broadcast(total, last, group=ps.get_pipeline_model_parallel_group())
    return dict(zip(box[0], total.tolist(), strict=True))


def broadcast_from_leader(make: Callable[[], _T]) -> _T:
    """What `make` gives on the first of the ranks that share a model, known to all of them: for
    what may differ from run to run, such as a server's or a tool's answer."""
    if not ps.model_parallel_is_initialized():
        return make()
    groups = (
        ps.get_tensor_model_parallel_group(),
        ps.get_context_parallel_group(),
        ps.get_pipeline_model_parallel_group(),
    )
    first = all(group.rank() == 0 for group in groups)
    box: list[Any] = [make() if first else None]
    for group in groups:  # to the group's ranks, which are the first ones of the next groups
        if group.size() > 1:
            dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def gather_over_data(items: list[Any]) -> list[Any]:
    """All data-parallel ranks' lists, joined in rank order, on every rank."""
    return _joined(items, data_group())


def gather_over_pipeline(items: list[Any]) -> list[Any]:
    """The pipeline stages' lists, joined in their order, on every stage."""
    return _joined(items, ps.get_pipeline_model_parallel_group())


def gather_over_all(items: list[Any]) -> list[Any]:
    """All ranks' lists, joined in rank order, on every rank."""
    return _joined(items, dist.group.WORLD)


def _joined(items: list[Any], group: Any) -> list[Any]:
    if group.size() == 1:
        return items
    boxes: list[Any] = [None] * group.size()
    dist.all_gather_object(boxes, items, group=group)
    return [item for box in boxes for item in box]


def sum_over_tokens(counts: Tensor) -> Tensor:
    """Counts of this rank's tokens, summed over the ranks that share a micro-batch's tokens."""
    total = counts.to(device.device(), copy=True)
    dist.all_reduce(total, group=ps.get_tensor_and_context_parallel_group())
    return total.cpu()


def max_over_expert_group(count: int) -> int:
    """The largest count of the ranks that meet in the expert layers; without an engine its own."""
    if not ps.model_parallel_is_initialized():
        return count
    group = ps.get_expert_tensor_and_model_parallel_group()
    if group.size() == 1:
        return count
    most = torch.tensor(count, device=device.device())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most)


def local_share(items: Sequence[_Item]) -> list[_Item]:
    """This rank's share of what all data-parallel ranks know: every `data_size`-th item."""
    return list(items[data_rank() :: data_size()])


def from_first_data_rank(draw: Callable[[], list[_T]]) -> list[_T]:
    """What the first data-parallel rank draws, on all of them, where drawing takes seconds."""
    return gather_over_data(draw() if data_rank() == 0 else [])


def map_over_data_ranks(
    items: Sequence[_Item], compute: Callable[[list[_Item]], Sequence[_T]]
) -> list[_T]:
    """compute's result for each item, in order, on every rank.

    Every data-parallel rank computes its `local_share`. Collective: all ranks call it with the same
    items.
    """
    numbers = local_share(range(len(items)))
    results = compute([items[number] for number in numbers])
    by_number = dict(gather_over_data(list(zip(numbers, results, strict=True))))
    return [by_number[number] for number in range(len(items))]


def shard_by_length(samples: Sequence[Sample], capacity: int) -> list[Batch]:
    """This data-parallel rank's part of a global batch, in micro-batches of `capacity` tokens.

    Longest first to the rank with the least, so that ranks finish together. With fewer samples than
    ranks (few groups of a rollout batch may carry a signal) the others get a filler.
    """
    size, rank = data_size(), data_rank()
    loads, local_samples = [0] * size, []
    for sample in sorted(samples, key=len, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += len(sample)
        if lightest == rank:
            local_samples.append(sample)
    if samples and not local_samples:
        return [collate([min(samples, key=len)]).as_filler()]
    return pack(local_samples, capacity)
