"""The engine: a Qwen3 model under a parallel layout, with a training step and an evaluation step.

A loss is a *sum*: the batch's loss weights carry mask and normaliser, so any aggregation is the
caller's choice and every layout gives the same gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from q3mega import device

# isort: split
import torch
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

from q3mega.config.layout import Layout
from q3mega.data.batch import Batch, Sample, collate
from q3mega.engine import checkpoint, parallel
from q3mega.engine.head import LMHead
from q3mega.engine.optimizer import OptimizerSpec, Updates, build_optimizer
from q3mega.engine.parallel import ContextShard, Count
from q3mega.errors import UserError
from q3mega.model import Qwen3Shape, huggingface, initial
from q3mega.model.attention import Positions
from q3mega.model.balance import Balance
from q3mega.model.megatron import build_model, transformer_config
from q3mega.model.routing import ROUTED_EXPERTS, Routing

_CHOICES = "expert_choices"  # in a checkpoint's state
FP8_TOKENS = 16  # a product's rows are a multiple of it
# (head, batch) -> (loss: a sum, metrics: name -> a sum, to add up over micro-batches and ranks)
LossFn = Callable[[LMHead, Batch], tuple[Tensor, dict[str, Tensor]]]
_T = TypeVar("_T")


class Engine:
    """One model. `optimizer=None` builds a frozen one (reference policy, teacher, judge).

    ids: of the tokenizer, where the embedding has more rows: the others have no mass in any loss
    and are never sampled. UserError for a tokenizer of more ids than rows.
    seed: of the weights that a fresh one starts from, the same ones under every layout; without
    `fresh` they have yet to be loaded.
    """

    def __init__(
        self,
        shape: Qwen3Shape,
        layout: Layout,
        *,
        seed: int,
        positions: Positions | None = None,
        optimizer: OptimizerSpec | None = None,
        dtype: torch.dtype = torch.float32,
        fp8: bool = False,
        ids: int | None = None,
        fresh: bool = True,
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
        if fresh:
            initial.draw(self.chunks, shape, seed)
        self.balance = (
            Balance(self.config) if shape.experts and shape.router_aux_loss_coef else None
        )
        self.routing: Routing | None = None
        if shape.experts:
            self.routing = Routing(shape.experts, shape.topk, self.balance)
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
        self.weight_version = 0  # of the weights so far
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
        self.updates = Updates(self.optimizer, self.schedule, optimizer.max_skipped)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss

    # -- weights ---------------------------------------------------------------------------------

    def load_hf(self, folder: str | Path) -> None:
        """Weights from a Hugging Face folder of this shape."""
        huggingface.load(self.chunks, self.shape, folder, self.ids)
        checkpoint.check_finite(self.chunks, f"checkpoint {folder} has", "restore or rebuild it")
        self.weight_version += 1
        if self.balance:
            self.balance.restore(None)  # they were other routers'
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def save_hf(self, folder: str | Path, tokens: dict[str, int], *, lm_head: bool = False) -> None:
        """Weights and config.json to a Hugging Face folder (every rank calls).

        lm_head: write it where it is tied, too.
        """
        checkpoint.check_finite(self.chunks, f"{folder} would get")
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
        """How positions enter attention: RoPE, YaRN, dual-chunk attention."""
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
        `grad_norm` and `lr`, and those of a mixture's balance. A loss or gradient that is not
        finite gives `skipped` and updates nothing, see `Updates`.
        """
        self.schedule.step(1)
        for module in self.modules:
            module.zero_grad_buffer()
            module.train()
        self.optimizer.zero_grad()
        parts, count = self._in_step([self._part(b) for b in batches])

        def loss_func(part: ContextShard, out: LMHead) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, metrics = loss_fn(out, part.batch)
            # megatron divides gradients by the token count
            held = torch.tensor(len(part.batch), dtype=torch.int, device=loss.device)
            return loss * count.held, held, {"loss": loss.detach(), **metrics}

        with self._balanced(parts, count):
            metrics = self._total(self._forward(parts, loss_func, forward_only=False))
        metrics |= self.updates.step(metrics["loss"])
        self.saver.poll()
        if "skipped" in metrics:
            return metrics
        self.updated = True
        self.weight_version += 1
        return metrics | (self.balance.close() if self.balance else {})

    def _balanced(self, parts: list[ContextShard], count: Count) -> AbstractContextManager[None]:
        """A step with balanced routers: count its choices first, or take those of the last one."""
        if not (self.balance and self.spec):
            return nullcontext()
        if self.balance.choices is None or self.spec.expert_shares == "step":
            with torch.no_grad(), self.balance.step(count.documents, count.held):
                zero = torch.zeros((), device=device.device())
                self._forward(parts, lambda *_: (zero, zero.int(), {}), forward_only=True)
            self.balance.close()
        return self.balance.step(count.documents, count.held)

    def evaluate(self, batches: Sequence[Batch], fn: Callable[[LMHead, Batch], _T]) -> list[_T]:
        """fn over this rank's micro-batches, no gradient: run by the last pipeline stage on whole
        micro-batches, the results known to all stages.
        """
        return self._evaluate(batches, fn)[0]

    def evaluate_routed(
        self, batches: Sequence[Batch], fn: Callable[[LMHead, Batch], _T]
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
        self, batches: Sequence[Batch], fn: Callable[[LMHead, Batch], _T]
    ) -> tuple[list[_T], list[Tensor]]:
        for module in self.modules:
            module.eval()
        parts = [self._part(b) for b in batches]
        if self.layout.expert > 1 or self.layout.virtual_pipeline > 1:  # ranks meet in every layer
            parts, _ = self._in_step(parts)

        def loss_func(part: ContextShard, out: LMHead) -> tuple[Tensor, Tensor, Any]:
            zero = out.hidden.new_zeros(())
            gathered = replace(out, hidden=part.whole(out.hidden), cp_group=None)
            return zero, torch.tensor(1, dtype=torch.int), fn(gathered, part.original)

        outputs = self._forward(parts, loss_func, forward_only=True)[: len(batches)]
        routes = self._whole_routes(parts[: len(batches)])
        return parallel.gather_over_pipeline(outputs), routes  # the other stages have none

    def _part(self, batch: Batch) -> ContextShard:
        config = self.config
        return parallel.shard_for_context_parallel(
            batch, sequence_parallel=config.sequence_parallel,
            multiple=FP8_TOKENS if config.fp8 else 1,
        )  # fmt: skip

    def _forward(
        self, parts: Sequence[ContextShard], loss_func: Any, forward_only: bool
    ) -> list[Any]:
        if not parts:
            return []

        def head(hidden_states: Tensor, output_layer: Any, output_weight: Any, **_: Any) -> LMHead:
            weight = output_layer.weight if output_weight is None else output_weight
            hidden = self.gathered(hidden_states)[:, 0]
            return LMHead(hidden, weight, self.tp_group, self.cp_group, self.valid_vocab)

        def forward_step(parts: Iterator[ContextShard], module: Any) -> tuple[Any, Any]:
            part = next(parts).to(device.device())  # one at a time: its columns may be wide
            longest = int(part.cu_seqlens.diff().max())
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=part.cu_seqlens,
                cu_seqlens_kv=part.cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            with self._replaying(part):
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

    def _replaying(self, part: ContextShard) -> AbstractContextManager[None]:
        """A forward pass in which the routers follow the batch's routes, if it has some."""
        if self.routing is None:
            return nullcontext()
        routes, real = part.batch.columns.get(ROUTED_EXPERTS), part.real
        if self.config.sequence_parallel:
            ways, rank = self.layout.tensor, ps.get_tensor_model_parallel_rank()
            routes = None if routes is None else routes.chunk(ways)[rank]
            real = real.chunk(ways)[rank]
        return self.routing.replaying(routes, real)

    def routes(self) -> list[dict[int, Tensor]]:
        """What the routers of this rank's layers recorded since the last call: of each pass, layer
        -> (tokens of the context-parallel rank, topk)."""
        assert self.routing is not None
        return [
            {layer: self.gathered(indices) for layer, indices in layers.items()}
            for layers in self.routing.passes()
        ]

    def _whole_routes(self, parts: Sequence[ContextShard]) -> list[Tensor]:
        """(T, layers * topk) of each micro-batch's tokens, of all stages' layers; none where
        nothing is recorded."""
        if self.routing is None or self.routing.recorded is None:
            return []
        by_layer = []
        for part, layers in zip(parts, self.routes(), strict=False):  # fillers come last
            by_layer.append({layer: part.whole(indices).cpu() for layer, indices in layers.items()})
        stages = parallel.gather_over_pipeline([by_layer])
        indices = []
        for passes in zip(*stages, strict=True):
            layers = {layer: routes for stage in passes for layer, routes in stage.items()}
            indices.append(torch.cat([layers[i] for i in sorted(layers)], 1))
        return indices

    def _in_step(self, parts: list[ContextShard]) -> tuple[list[ContextShard], Count]:
        # an interleaved pipeline goes round in whole turns
        turn = self.layout.pipeline if self.layout.virtual_pipeline > 1 else 1
        return parallel.in_step(parts, lambda: self._part(collate([Sample([0], [0.0])])), turn)

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
        if not self.updated:
            return
        checkpoint.check_finite(self.chunks, f"checkpoint {folder} would get")
        if self.balance and self.balance.choices is not None:
            state = {**state, _CHOICES: self.balance.choices.tolist()}
        self.saver.save(self, folder, step, state, tensors or {})

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is published."""
        self.saver.finish()

    def load_latest(self, folder: Path) -> tuple[int, dict[str, Any]] | None:
        """Resume from the newest complete checkpoint: (step, state), or None when there is none."""
        self.finish_saving()
        loaded = checkpoint.load_latest(self, folder)
        self.updated = loaded is not None
        self.weight_version += self.updated
        if loaded and self.balance:
            self.balance.restore(loaded[1].pop(_CHOICES, None))
        return loaded
