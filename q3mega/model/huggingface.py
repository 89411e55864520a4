"""Hugging Face checkpoints in and out of a megatron-core model, any layout.

One pair of functions, `_merge` and `_split`, is the whole weight map; shards are cut from, and
gathered into, the full tensor that they describe. Reading touches only what a rank needs, writing
is shared by the ranks that hold a pipeline stage's or an expert's first copy; neither holds more
than one file's tensors beside the model.
"""

from q3mega import device

# isort: split
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors.torch import save_file
from torch import Tensor

from q3mega.errors import UserError
from q3mega.model import config
from q3mega.model.config import shape_of
from q3mega.model.reader import EMBEDDING, INDEX, LM_HEAD, SINGLE, Reader
from q3mega.model.sizes import Qwen3Shape, rows_over

_TOP = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": LM_HEAD,
}
_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")  # Transformer Engine's
FILE_BYTES = 4 << 30  # of one file, and of what a rank holds of it at once


def _merge(name: str, prefix: str, shape: Qwen3Shape, read: Reader) -> Tensor:
    """The full megatron tensor of a layer parameter, from Hugging Face tensors under `prefix`."""
    if name == "self_attention.linear_qkv.weight":
        groups, dim = shape.kv_heads, shape.head_dim
        parts = [read(f"{prefix}self_attn.{p}_proj.weight") for p in "qkv"]
        return torch.cat([p.view(groups, -1, dim, shape.hidden) for p in parts], 1).flatten(0, 2)
    if name == "mlp.linear_fc1.weight":
        return torch.cat([read(f"{prefix}mlp.{p}_proj.weight") for p in ("gate", "up")])
    if match := _EXPERT.fullmatch(name):
        stacked = f"{prefix}mlp.experts."
        stacked += "down_proj" if match[2] == "linear_fc2" else "gate_up_proj"
        if stacked in read:
            return read(stacked, int(match[1]))
        expert = f"{prefix}mlp.experts.{match[1]}."
        if match[2] == "linear_fc2":
            return read(f"{expert}down_proj.weight")
        return torch.cat([read(f"{expert}{p}_proj.weight") for p in ("gate", "up")])
    return read(prefix + _LAYER[name])


def _split(name: str, prefix: str, shape: Qwen3Shape, full: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `_merge`."""
    if name == "self_attention.linear_qkv.weight":
        per_group = shape.heads // shape.kv_heads
        groups = full.view(shape.kv_heads, per_group + 2, shape.head_dim, shape.hidden)
        for p, part in zip("qkv", groups.split([per_group, 1, 1], dim=1), strict=True):
            yield f"{prefix}self_attn.{p}_proj.weight", part.reshape(-1, shape.hidden)
    elif name == "mlp.linear_fc1.weight":
        for p, part in zip(("gate", "up"), full.chunk(2), strict=True):
            yield f"{prefix}mlp.{p}_proj.weight", part
    elif match := _EXPERT.fullmatch(name):
        expert = f"{prefix}mlp.experts.{match[1]}."
        if match[2] == "linear_fc2":
            yield f"{expert}down_proj.weight", full
        else:
            for p, part in zip(("gate", "up"), full.chunk(2), strict=True):
                yield f"{expert}{p}_proj.weight", part
    else:
        yield prefix + _LAYER[name], full


def named_tensors(model: Any) -> Iterator[tuple[str, str, Tensor]]:
    """(name in its layer, Hugging Face prefix, this rank's tensor); experts by global number."""
    offset = get_transformer_layer_offset(model.config, vp_stage=model.vp_stage)
    for name, tensor in model.named_parameters():
        if name in _TOP:
            yield name, "", tensor
            continue
        layer, name = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
        name = _GROUPED.sub(r"mlp.experts.local_experts.\2.\1.weight", name)
        if match := _EXPERT.fullmatch(name):
            per_rank = model.config.num_moe_experts // ps.get_expert_model_parallel_world_size()
            expert = int(match[1]) + ps.get_expert_model_parallel_rank() * per_rank
            name = f"mlp.experts.local_experts.{expert}.{match[2]}.weight"
        yield name, f"model.layers.{int(layer) + offset}.", tensor


def _shard_group(name: str) -> Any:
    expert = _EXPERT.fullmatch(name)
    return ps.get_expert_tensor_parallel_group() if expert else ps.get_tensor_model_parallel_group()


def _shard_dim(name: str) -> int | None:
    """The dimension cut by tensor parallelism. None: every rank holds the whole."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return 1
    if name.endswith(("linear_qkv.weight", "linear_fc1.weight")) or name in _OF_VOCABULARY:
        return 0
    return None


def shard_of_rank(name: str, full: Tensor) -> Tensor:
    """This rank's part of a full tensor."""
    dim, group = _shard_dim(name), _shard_group(name)
    if dim is None or group.size() == 1:
        return full
    if name in _OF_VOCABULARY:
        full = _rows(full, rows_over(len(full), group.size()))
    parts = full.chunk(2) if name.endswith("linear_fc1.weight") else (full,)  # gate and up apart
    return torch.cat([p.chunk(group.size(), dim)[group.rank()] for p in parts])


def _gather(name: str, shard: Tensor) -> Tensor:
    dim, group = _shard_dim(name), _shard_group(name)
    if dim is None or group.size() == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    if not name.endswith("linear_fc1.weight"):
        return torch.cat(shards, dim)
    gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
    return torch.cat([*gates, *ups])


def _of_all_ranks(item: Any) -> list[Any]:
    boxes: list[Any] = [item] * dist.get_world_size()
    if len(boxes) > 1:
        dist.all_gather_object(boxes, item)
    return boxes


def _rows(full: Tensor, rows: int) -> Tensor:
    """(rows, H) of a matrix over the vocabulary: cut, or filled up by zeros."""
    if len(full) >= rows:
        return full[:rows]
    return torch.cat([full, full.new_zeros(rows - len(full), full.shape[1])])


def load(models: list[Any], shape: Qwen3Shape, folder: str | Path, ids: int | None = None) -> None:
    """Fill this rank's part of the model from a Hugging Face folder; every rank calls.

    ids: of the tokenizer. Rows beyond them stand for nothing: a folder may have more or fewer.
    Raises UserError for another shape, a missing tensor, and one that has no place in the model.
    """
    folder = Path(folder)
    file_shape = shape_of(folder)
    if ids is not None and min(file_shape.vocab, shape.vocab) >= ids:
        file_shape = replace(file_shape, vocab=shape.vocab)
    width = "moe_ffn" if shape.experts else "ffn"
    for field in (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "vocab",
        "tied",
        "norm_eps",
        "yarn",
        "experts",
        width,
        *(("topk", "norm_topk") if shape.experts else ()),
    ):
        have, want = getattr(file_shape, field), getattr(shape, field)
        if have != want:
            raise UserError(
                f"checkpoint {folder} has {field}={have} but the recipe's model has {field}={want}"
                ": change the model section or start from a checkpoint of this shape"
            )
    read = Reader(folder, shape_of(folder))
    read.check_tied()
    with torch.no_grad():
        for model in models:
            for name, prefix, tensor in named_tensors(model):
                if name == "output_layer.weight" and shape.tied:  # last stage of a tied pipeline
                    full = read(_TOP["embedding.word_embeddings.weight"])
                else:
                    full = read(_TOP[name]) if name in _TOP else _merge(name, prefix, shape, read)
                if name in _OF_VOCABULARY:
                    full = _rows(full, shape.vocab)
                tensor.copy_(shard_of_rank(name, full))
    read.check_leftovers(set().union(*_of_all_ranks(read.used)))


def _spoken(models: list[Any], shape: Qwen3Shape) -> Iterator[list[tuple[str, Tensor]]]:
    """For each parameter, Hugging Face names and tensors that this rank hands over: none, where
    another rank does. Every rank calls."""
    for model in models:
        for name, prefix, tensor in named_tensors(model):
            full = _gather(name, tensor.detach())
            if not _speaks(name) or (name == "output_layer.weight" and shape.tied):
                yield []
                continue
            if name in _OF_VOCABULARY:
                full = full[: shape.vocab]
            parts = [(_TOP[name], full)] if name in _TOP else _split(name, prefix, shape, full)
            yield [(n, t.contiguous()) for n, t in parts]


def whole(models: list[Any], shape: Qwen3Shape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, on rank 0 and its device; nothing on the others.

    Every rank calls, and consumes it. A rank holds one parameter's tensors at a time.
    """
    rank, rows = dist.get_rank(), _spoken(models, shape)
    count = sum(1 for model in models for _ in model.named_parameters())
    for _ in range(max(_of_all_ranks(count))):  # the ranks in step: stages differ in length
        row = next(rows, [])
        shapes = [(n, t.shape, t.dtype) for n, t in row] if rank else []
        for source, box in enumerate(_of_all_ranks(shapes)):
            if rank == source:
                for _, tensor in row if rank else ():
                    dist.send(tensor, 0)
            elif rank == 0:
                for name, size, dtype in box:
                    tensor = torch.empty(size, dtype=dtype, device=device.device())
                    dist.recv(tensor, source)
                    yield name, tensor
        if rank == 0:
            yield from row


def _speaks(name: str) -> bool:
    """Whether this rank hands the parameter over: one of those that hold the same does."""
    if _EXPERT.fullmatch(name):  # experts are laid out over the ranks in a way of their own
        copies = ps.get_expert_data_parallel_rank()
    else:
        copies = ps.get_data_parallel_rank(with_context_parallel=True)
    return copies == 0 and _shard_group(name).rank() == 0


def save(
    models: list[Any],
    shape: Qwen3Shape,
    folder: str | Path,
    *,
    tokens: dict[str, int],
    lm_head: bool = False,
) -> None:
    """Write weights and config.json; every rank calls, on one file system.

    Files appear under their names when all are written. More than one has an index. lm_head: write
    it where it is tied, too.
    """
    folder = Path(folder)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for cut in folder.glob("*.partial"):
            cut.unlink()
        dtype = models[0].config.params_dtype
        config.write(folder, shape, tokens, dtype)
    dist.barrier()
    files: list[tuple[str, dict[str, int]]] = []  # (partial file, tensor -> bytes)
    held: dict[str, Tensor] = {}

    def write() -> None:
        partial = f"{dist.get_rank():05d}-{len(files):05d}.partial"
        save_file(dict(sorted(held.items())), folder / partial, metadata={"format": "pt"})
        files.append((partial, {name: t.nbytes for name, t in held.items()}))
        held.clear()

    size = 0
    for name, tensor in (pair for row in _spoken(models, shape) for pair in row):
        held[name] = tensor.to("cpu", copy=True)
        size += tensor.nbytes
        if lm_head and shape.tied and name == EMBEDDING:
            held[LM_HEAD] = held[name].clone()
            size += tensor.nbytes
        if size >= FILE_BYTES:
            write()
            size = 0
    if held:
        write()
    boxes = _of_all_ranks(files)
    if dist.get_rank() == 0:
        _publish(folder, [file for box in boxes for file in box])
    dist.barrier()


def _publish(folder: Path, files: list[tuple[str, dict[str, int]]]) -> None:
    for old in (folder / INDEX, *folder.glob("model*.safetensors")):
        old.unlink(missing_ok=True)
    if len(files) == 1:
        os.replace(folder / files[0][0], folder / SINGLE)
        return
    where = {}
    for i, (partial, sizes) in enumerate(files, 1):
        final = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / partial, folder / final)
        where.update(dict.fromkeys(sizes, final))
    total = sum(size for _, sizes in files for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
