"""The weights of a fresh model: one draw of the whole model, of which each rank keeps its part.

Both ends, attention and dense layers come one after another from one stream of random numbers, so
a rank also draws those that come before its own. An expert has a stream of its own and is drawn
where it is held: a mixture's experts are nearly all of it.
"""

from q3mega import device  # noqa: F401

# isort: split
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from q3mega.model.huggingface import named_tensors, shard_of_rank
from q3mega.model.sizes import Qwen3Shape

_Init = Callable[[Tensor], Any]
_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.linear_fc1\.weight"
)


@torch.no_grad()
def draw(models: list[Any], shape: Qwen3Shape, seed: int) -> None:
    """Fill this rank's parts of a model, norms apart: the same weights under every layout.

    In fp32 on the CPU, with megatron-core's standard deviations. Reseeds torch's generator there.
    """
    held: dict[str, tuple[str, Tensor]] = {}
    for model in models:
        for name, prefix, tensor in named_tensors(model):
            held[prefix + name] = name, tensor
    torch.default_generator.manual_seed(seed)
    for keys, size, init in _stream(shape, models[0].config):
        _fill(held, keys, size, init)
    for key in list(held):
        if match := _EXPERT.fullmatch(key):
            torch.default_generator.manual_seed(zlib.crc32(repr((seed, *match.groups())).encode()))
            up, down = key, key.replace("fc1", "fc2")
            _fill(held, [up], (2 * shape.moe_ffn, shape.hidden), models[0].config.init_method)
            outer = models[0].config.output_layer_init_method
            _fill(held, [down], (shape.hidden, shape.moe_ffn), outer)


def _stream(shape: Qwen3Shape, config: Any) -> Iterator[tuple[list[str], tuple[int, int], _Init]]:
    """Who takes the next matrix, its size and its distribution, in the order of one process."""
    inner, outer = config.init_method, config.output_layer_init_method
    hidden, queries = shape.hidden, shape.heads * shape.head_dim
    projected = queries + 2 * shape.kv_heads * shape.head_dim
    ends = "embedding.word_embeddings.weight", "output_layer.weight"
    first = [*ends] if shape.tied else [ends[0]]  # a tied pipeline's last stage holds a copy
    yield first, (shape.vocab, hidden), config.embedding_init_method
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield [f"{prefix}self_attention.linear_proj.weight"], (hidden, queries), outer
        yield [f"{prefix}self_attention.linear_qkv.weight"], (projected, hidden), inner
        if shape.experts:
            yield [f"{prefix}mlp.router.weight"], (shape.experts, hidden), inner
        else:
            yield [f"{prefix}mlp.linear_fc1.weight"], (2 * shape.ffn, hidden), inner
            yield [f"{prefix}mlp.linear_fc2.weight"], (hidden, shape.ffn), outer
    if not shape.tied:
        yield [ends[1]], (shape.vocab, hidden), inner


def _fill(
    held: dict[str, tuple[str, Tensor]], keys: list[str], size: tuple[int, int], init: _Init
) -> None:
    full = torch.empty(size)
    init(full)
    for name, tensor in (held[key] for key in keys if key in held):
        tensor.copy_(shard_of_rank(name, full))
