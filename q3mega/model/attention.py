"""Core attention of our Qwen3: the one place that knows positions, and where a KV cache lives.

megatron-core's SelfAttention projects and normalises; it is built without a rotary embedding, so
queries and keys arrive here un-rotated. RoPE, a changed base (ABF), YaRN and dual-chunk attention
are thus properties of this module alone, and no weight depends on them.
"""

from q3mega import device  # noqa: F401

# isort: split
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from q3mega import ops
from q3mega.model.sizes import Yarn
from q3mega.ops import rotary
from q3mega.ops.context_parallel import context_parallel_attention

PLAIN = 1 << 30  # a chunk that no sequence outgrows: dual-chunk attention is then RoPE attention


@dataclass(frozen=True)
class Positions:
    """How token indices become angles.

    base: RoPE base. yarn: an extended context. chunk_size, local_size: dual-chunk attention
    (PLAIN, 1 = ordinary attention).
    """

    base: float
    yarn: Yarn | None = None
    chunk_size: int = PLAIN
    local_size: int = 1

    def inv_freq(self, head_dim: int) -> Tensor:
        """(head_dim / 2,) radians a token."""
        if self.yarn is None:
            return rotary.inv_freq(head_dim, self.base)
        return rotary.yarn_inv_freq(
            head_dim, self.base, self.yarn.factor, self.yarn.original_length,
            self.yarn.beta_fast, self.yarn.beta_slow, truncate=self.yarn.truncate,
        )  # fmt: skip

    @property
    def logit_scale(self) -> float:
        """YaRN's temperature: both rotated operands carry its factor, so logits have the square."""
        if self.yarn is None:
            return 1.0
        if self.yarn.attention_factor is not None:
            return self.yarn.attention_factor**2
        return rotary.yarn_attention_factor(self.yarn.factor) ** 2


class KVCache:
    """Rotated keys and values of one batch of sequences, for every layer of this process.

    keys, values: per layer (B, Hkv, capacity, D). lengths: (B,) tokens held by each sequence.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.lengths = torch.zeros(0, dtype=torch.long)

    def fill(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> None:
        """Write a packed prefill (T, Hkv, D) as a new batch of sequences."""
        lengths = cu_seqlens.diff().long()
        batch = len(lengths)
        row = torch.repeat_interleave(torch.arange(batch, device=key.device), lengths)
        column = torch.arange(len(key), device=key.device) - cu_seqlens.long()[row]
        shape = (batch, key.shape[1], self.capacity, key.shape[2])
        for store, packed in ((self.keys, key), (self.values, value)):
            store[layer] = packed.new_zeros(shape)
            store[layer][row, :, column] = packed
        self.lengths = lengths

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write one token a sequence, (B, Hkv, D), at each sequence's own end."""
        row = torch.arange(len(key), device=key.device)
        self.keys[layer][row, :, self.lengths] = key
        self.values[layer][row, :, self.lengths] = value

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but `rows`."""
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][rows]
        self.lengths = self.lengths[rows]


@dataclass
class AttentionState:
    """What all core attentions of a model share: positions, and a cache while sampling."""

    positions: Positions
    cache: KVCache | None = None
    _inv_freq: dict[tuple[Positions, int], Tensor] = field(default_factory=dict)

    def inv_freq(self, head_dim: int, on: torch.device) -> Tensor:
        """RoPE's inverse frequencies (head_dim / 2,), with YaRN where it is set."""
        key = (self.positions, head_dim)
        if key not in self._inv_freq:
            self._inv_freq[key] = self.positions.inv_freq(head_dim).to(on)
        return self._inv_freq[key]


class CoreAttention(MegatronModule):
    """Packed causal attention with our positions; with a cache, also its prefill and its decode."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer = layer_number
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.state: AttentionState | None = None  # shared; set by build_model

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Packed: q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq * D); T are the tokens held here,
        cu_seqlens the borders of the whole pack.

        Decode, one token a cached sequence: q (B, 1, Hq, D), k and v (B, 1, Hkv, D)
        -> (B, 1, Hq * D).
        """
        state = self.state
        assert state is not None
        inv_freq = state.inv_freq(query.shape[-1], query.device)
        scale = self.scale * state.positions.logit_scale
        if packed_seq_params is None:
            return self._decode(query[:, 0], key[:, 0], value[:, 0], inv_freq, scale)[:, None]
        cu_seqlens = packed_seq_params.cu_seqlens_q
        attend = ops.dual_chunk_attention
        if self.config.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
            attend = partial(context_parallel_attention, cp_group=group)
        out = attend(
            query,
            key,
            value,
            chunk_size=state.positions.chunk_size,
            local_size=state.positions.local_size,
            inv_freq=inv_freq,
            cu_seqlens=cu_seqlens,
            softmax_scale=scale,
        )
        if state.cache is not None:
            index = torch.arange(len(key), device=key.device)
            start = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
            position = (index - start) % self._chunk_length()
            state.cache.fill(self.layer, rotary.rotate(key, position, inv_freq), value, cu_seqlens)
        return out.flatten(1)

    def _chunk_length(self) -> int:
        assert self.state is not None
        return self.state.positions.chunk_size - self.state.positions.local_size

    def _decode(
        self, query: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor, scale: float
    ) -> Tensor:
        """One new token a sequence, each at its own position, against the cache."""
        assert self.state is not None and self.state.cache is not None
        cache, positions = self.state.cache, self.state.positions
        now, chunk = cache.lengths, self._chunk_length()
        cache.append(self.layer, rotary.rotate(key, now % chunk, inv_freq), value)
        used = int(now.max()) + 1
        keys, values = cache.keys[self.layer][:, :, :used], cache.values[self.layer][:, :, :used]
        batch, heads, dim = query.shape
        index = torch.arange(used, device=query.device)

        def scores(position: Tensor) -> Tensor:
            rotated = rotary.rotate(query, position, inv_freq)
            grouped = rotated.view(batch, keys.shape[1], -1, dim)
            return torch.matmul(grouped, keys.transpose(-1, -2)) * scale

        logits = scores(now % chunk)
        if used > chunk:  # dual-chunk: the query's angle depends on how many chunks back a key lies
            back = (now // chunk)[:, None] - index // chunk
            successive = (now % chunk + chunk).clamp(max=positions.chunk_size)
            inter = torch.full_like(now, min(2 * chunk - 1, positions.chunk_size))
            back = back[:, None, None]
            logits = torch.where(back == 1, scores(successive), logits)
            logits = torch.where(back > 1, scores(inter), logits)
        logits = logits.masked_fill((index > now[:, None])[:, None, None], -torch.inf)
        return torch.matmul(logits.softmax(-1), values).reshape(batch, heads * dim)
