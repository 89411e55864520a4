"""The engine: a Qwen3 model under a parallel layout, with a training step and an evaluation step.

A loss is a *sum*: the batch's loss weights carry mask and normaliser, so any aggregation is the
caller's choice and every layout gives the same gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from q3mega import device

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from q3mega.data.batch import Batch, Sample, collate
from q3mega.engine import checkpoint, parallel
from q3mega.engine.optimizer import OptimizerSpec, build_optimizer
from q3mega.engine.parallel import Part
from q3mega.errors import UserError
from q3mega.model import Qwen3Shape, huggingface
from q3mega.model.attention import Positions
from q3mega.model.megatron import build_model, transformer_config
from q3mega.model.routing import COLUMN, Routing
from q3mega.ops import vocab


@dataclass
class Head:
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
        own = (self.hidden @ self.weight.T).float()
        if self.tp_group is None:
            return own[:, : self.valid_vocab]
        shards = [torch.empty_like(own) for _ in range(self.tp_group.size())]
        dist.all_gather(shards, own, group=self.tp_group)
        return torch.cat(shards, -1)[:, : self.valid_vocab]

    def rows(self, ids: Tensor) -> Tensor:
        """(n, H) the lm_head's rows of the ids, whichever rank holds them; differentiable."""
        place = ids - vocab.offset(self.weight, self.tp_group)
        held = ((place >= 0) & (place < len(self.weight)))[:, None]
        own = self.weight[place.clamp(0, len(self.weight) - 1)]
        return vocab.total(torch.where(held, own, 0.0), self.tp_group)


FP8_TOKENS = 16  # a product's rows are a multiple of it
# (head, batch) -> (loss: a sum, metrics: name -> a sum, to add up over micro-batches and ranks)
LossFn = Callable[[Head, Batch], tuple[Tensor, dict[str, Tensor]]]
_T = TypeVar("_T")


class Engine:
    """One model. `optimizer=None` builds a frozen one (reference policy, teacher, judge).

    ids: of the tokenizer, where the embedding has more rows: the others have no mass in any loss
    and are never sampled. UserError for a tokenizer of more ids than rows.
    """

    def __init__(
        self,
        shape: Qwen3Shape,
        layout: Any,
        *,
        seed: int,
        positions: Positions | None = None,
        optimizer: OptimizerSpec | None = None,
        dtype: torch.dtype = torch.float32,
        fp8: bool = False,
        ids: int | None = None,
    ) -> None:
        if ids is not None and ids > shape.vocab:
            raise UserError(
                f"the tokenizer has {ids} ids, the model's embedding {shape.vocab} rows: take the "
                "model's own tokenizer, or resize the model with transformers first"
            )
        self.ids = ids
        self.shape, self.layout, self.spec = shape, layout, optimizer
        parallel.initialise(layout, seed)
        fields = parallel.config_fields(layout, shape.layers)
        self.config = transformer_config(shape, dtype=dtype, fp8=fp8, **fields)
        positions = positions or Positions(shape.rope_base, shape.yarn)
        stages = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else (None,)
        self.chunks = [build_model(shape, self.config, positions, stage) for stage in stages]
        self.routing = Routing(shape.experts, shape.topk) if shape.experts else None
        if self.routing:
            self.routing.attach(self.chunks)
        self.modules: list[Any] = [c.to(device.device()) for c in self.chunks]
        if dtype == torch.bfloat16:
            self.modules = [Float16Module(self.config, m) for m in self.modules]
        group = ps.get_tensor_model_parallel_group()
        self.tp_group = group if group.size() > 1 else None
        group = ps.get_context_parallel_group()
        self.cp_group = group if group.size() > 1 else None
        self.optimizer: Any = None
        self.updated = False
        self.changes = 0  # of the weights so far
        self.saver = checkpoint.Saver()
        if optimizer is None:
            for module in self.modules:
                module.requires_grad_(False)
            return
        distributed = layout.distributed_optimizer and optimizer.kind != "muon"
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
        )
        self.modules = [DistributedDataParallel(self.config, ddp, m) for m in self.modules]
        self.optimizer, self.schedule = build_optimizer(
            optimizer, self.modules, distributed=distributed, dtype=dtype
        )
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss

    # -- weights ---------------------------------------------------------------------------------

    def load_hf(self, folder: str | Path) -> None:
        """Weights from a Hugging Face folder of this shape."""
        huggingface.load(self.chunks, self.shape, folder, self.ids)
        self.changes += 1
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def save_hf(self, folder: str | Path, tokens: dict[str, int], *, lm_head: bool = False) -> None:
        """Weights and config.json to a Hugging Face folder (every rank calls).

        lm_head: write it where it is tied, too.
        """
        at = self.positions
        shape = replace(self.shape, rope_base=at.base, yarn=at.yarn)
        huggingface.save(self.chunks, shape, folder, tokens=tokens, lm_head=lm_head)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What `save_hf` writes, on rank 0: see `huggingface.whole`. Every rank consumes it."""
        return huggingface.whole(self.chunks, self.shape)

    @property
    def valid_vocab(self) -> int:
        """Ids that the model can say: the rows that a layout adds are none either."""
        return self.shape.vocab if self.ids is None else self.ids

    @property
    def positions(self) -> Positions:
        return self.chunks[0].attention_state.positions

    @positions.setter
    def positions(self, positions: Positions) -> None:
        """Change the position scheme (ABF, YaRN, dual-chunk); no weight depends on it."""
        for chunk in self.chunks:
            chunk.attention_state.positions = positions

    # -- steps -----------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], loss_fn: LossFn) -> dict[str, float]:
        """Forward and backward over this data-parallel rank's micro-batches, then one update.

        Returns the metrics summed over micro-batches and data-parallel ranks, plus `loss`,
        `grad_norm` and `lr`.
        """
        self.schedule.step(1)
        for module in self.modules:
            module.zero_grad_buffer()
            module.train()
        self.optimizer.zero_grad()
        parts = [self._part(b) for b in batches]
        parts, tokens = self._same_count(parts)

        def loss_func(part: Part, out: Head) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, metrics = loss_fn(out, part.batch)
            # megatron divides gradients by the token count; the MoE balance loss relies on it
            count = torch.tensor(len(part.batch), dtype=torch.int, device=loss.device)
            return loss * tokens, count, {"loss": loss.detach(), **metrics}

        found = self._forward(parts, loss_func, forward_only=False)
        success, grad_norm, _ = self.optimizer.step()
        self.updated = True
        self.changes += 1
        self.saver.poll()
        metrics = self._total(found)
        if not success:
            metrics["skipped"] = 1.0
        metrics["grad_norm"] = float(grad_norm or 0.0)
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        return metrics

    def evaluate(self, batches: Sequence[Batch], fn: Callable[[Head, Batch], _T]) -> list[_T]:
        """fn over this rank's micro-batches, no gradient: run by the last pipeline stage on whole
        micro-batches, the results known to all stages.
        """
        return self._evaluate(batches, fn)[0]

    def evaluate_routed(
        self, batches: Sequence[Batch], fn: Callable[[Head, Batch], _T]
    ) -> tuple[list[_T], list[Tensor]]:
        """`evaluate` of a mixture of experts, and of each batch the (T, layers * topk) routes that
        its routers choose by themselves, also where they replay the batch's. UserError for a dense
        model.
        """
        if self.routing is None:
            raise UserError("routes (routing_replay) need a model with experts, this is dense")
        with self.routing.recording():
            return self._evaluate(batches, fn)

    @torch.no_grad()
    def _evaluate(
        self, batches: Sequence[Batch], fn: Callable[[Head, Batch], _T]
    ) -> tuple[list[_T], list[Tensor]]:
        for module in self.modules:
            module.eval()
        parts = [self._part(b) for b in batches]
        if self.layout.expert > 1 or self.layout.virtual_pipeline > 1:  # ranks meet in every layer
            parts, _ = self._same_count(parts)

        def loss_func(part: Part, out: Head) -> tuple[Tensor, Tensor, Any]:
            zero = out.hidden.new_zeros(())
            whole = replace(out, hidden=part.whole(out.hidden), cp_group=None)
            return zero, torch.tensor(1, dtype=torch.int), fn(whole, part.original)

        found = self._forward(parts, loss_func, forward_only=True)[: len(batches)]
        routes = self._whole_routes(parts[: len(batches)])
        return parallel.gather_over_pipeline(found), routes  # the other stages have none

    def _part(self, batch: Batch) -> Part:
        config = self.config
        return parallel.part(
            batch, sequence_parallel=config.sequence_parallel,
            multiple=FP8_TOKENS if config.fp8 else 1,
        )  # fmt: skip

    def _forward(self, parts: Sequence[Part], loss_func: Any, forward_only: bool) -> list[Any]:
        if not parts:
            return []

        def head(hidden_states: Tensor, output_layer: Any, output_weight: Any, **_: Any) -> Head:
            weight = output_layer.weight if output_weight is None else output_weight
            hidden = self.gathered(hidden_states)[:, 0]
            return Head(hidden, weight, self.tp_group, self.cp_group, self.valid_vocab)

        def forward_step(parts: Iterator[Part], module: Any) -> tuple[Any, Any]:
            part = next(parts).to(device.device())  # one at a time: its columns may be wide
            longest = int(part.cu_seqlens.diff().max())
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=part.cu_seqlens,
                cu_seqlens_kv=part.cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            with self._replaying(part.batch):
                out = module(
                    part.batch.tokens[None],
                    None,
                    None,
                    packed_seq_params=packed,
                    output_processor=head,
                )
            return out, partial(loss_func, part)

        if self.routing:
            self.routing.begin(
                recomputes=self.layout.recompute in ("experts", "full") and not forward_only
            )
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(parts) for _ in self.modules]
            if len(self.modules) > 1
            else iter(parts),
            model=self.modules if len(self.modules) > 1 else self.modules[0],
            num_microbatches=len(parts),
            seq_length=max(int(p.cu_seqlens[-1]) for p in parts),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def gathered(self, hidden: Tensor) -> Tensor:
        """(T, ...) of the last layer's output, of which sequence parallelism leaves a rank a part.

        The gradient is not summed here: the losses' operators sum it over the group themselves.
        """
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)

    def _replaying(self, batch: Batch) -> AbstractContextManager[None]:
        """A forward pass in which the routers follow the batch's routes, if it has some."""
        if self.routing is None:
            return nullcontext()
        routes = batch.columns.get(COLUMN)
        if routes is not None and self.config.sequence_parallel:
            ways, rank = self.layout.tensor, ps.get_tensor_model_parallel_rank()
            routes = routes.chunk(ways)[rank]
        return self.routing.replaying(routes)

    def routes(self) -> list[dict[int, Tensor]]:
        """What the routers of this rank's layers recorded since the last call: of each pass, layer
        -> (tokens of the context-parallel rank, topk)."""
        assert self.routing is not None
        return [
            {layer: self.gathered(found) for layer, found in layers.items()}
            for layers in self.routing.passes()
        ]

    def _whole_routes(self, parts: Sequence[Part]) -> list[Tensor]:
        """(T, layers * topk) of each micro-batch's tokens, of all stages' layers; none where
        nothing is recorded."""
        if self.routing is None or self.routing.recorded is None:
            return []
        mine = []
        for part, layers in zip(parts, self.routes(), strict=False):  # fillers come last
            mine.append({layer: part.whole(found).cpu() for layer, found in layers.items()})
        stages = parallel.gather_over_pipeline([mine])
        found = []
        for passes in zip(*stages, strict=True):
            layers = {layer: routes for stage in passes for layer, routes in stage.items()}
            found.append(torch.cat([layers[i] for i in sorted(layers)], 1))
        return found

    def _same_count(self, parts: list[Part]) -> tuple[list[Part], int]:
        """As many micro-batches on every rank (weightless repeats), and all ranks' tokens."""
        here = device.device()
        count = torch.tensor([len(parts), sum(len(p.batch) for p in parts)], device=here)
        counts = [count.clone() for _ in range(parallel.data_size())]
        if len(counts) > 1:
            dist.all_gather(counts, count, group=parallel.data_group())
        most = max(int(c[0]) for c in counts)
        if self.layout.virtual_pipeline > 1:  # an interleaved pipeline goes round in whole turns
            most = -(-most // self.layout.pipeline) * self.layout.pipeline
        spare = parts[0] if parts else self._part(collate([Sample([0], [0.0])]))
        fillers = [_weightless(spare) for _ in range(most - len(parts))]
        tokens = sum(int(c[1]) for c in counts)
        if most * len(counts) > sum(int(c[0]) for c in counts):  # they count in megatron's divisor
            extra = torch.tensor(sum(len(p.batch) for p in fillers), device=here)
            dist.all_reduce(extra, group=parallel.data_group())
            tokens += int(extra)
        return [*parts, *fillers], tokens * self.layout.context

    def _total(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        names = sorted(parts[0]) if parts else []
        return parallel.sum_over_data(
            {n: sum(float(p[n]) for p in parts) for n in names}, self.config
        )

    # -- state -----------------------------------------------------------------------------------

    def save(
        self,
        folder: Path,
        step: int,
        state: dict[str, Any],
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Checkpoint everything that the next step depends on, behind the steps that follow.

        state: plain data for JSON. tensors: the same on every rank; they load as state["tensors"].
        It counts once all of it is on the disk: a later step, or `finish_saving`, publishes it.
        Before the first update there is nothing to save: a resume starts over to the same state.
        """
        if self.updated:
            self.saver.save(self, folder, step, state, tensors or {})

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is published."""
        self.saver.finish()

    def load_latest(self, folder: Path) -> tuple[int, dict[str, Any]] | None:
        """Resume from the newest complete checkpoint: (step, state), or None when there is none."""
        self.finish_saving()
        found = checkpoint.load_latest(self, folder)
        self.updated = found is not None
        self.changes += self.updated
        return found


def _weightless(part: Part) -> Part:
    weights = torch.zeros_like(part.batch.loss_weights)
    return replace(part, batch=replace(part.batch, loss_weights=weights))
