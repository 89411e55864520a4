"""The CUDA kernels of csrc/cuda, on Hopper: rows of fp32 logits, attention in bf16 and fp16.

They are compiled for sm_90a and tested by emulation on a CPU; they have not yet run on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from q3mega import _cuda
from q3mega.kernels.tiles import query_tiles
from q3mega.ops import rotary
from q3mega.ops.rotary import Turns

TYPES = {torch.bfloat16: 0, torch.float16: 1}
QUERIES = 128  # rows of a query tile
FAR = 1 << 30  # beyond every token, and twice that fits an int32


def serves(x: Tensor) -> str | None:
    if not x.is_cuda:
        return f"the tensors are on {x.device}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major != 9:
        return f"the kernels are made for compute capability 9.0 (Hopper), not {major}.{minor}"
    return "fp64 is the reference's" if x.dtype == torch.float64 else None


def serves_attention(q: Tensor) -> str | None:
    if q.dtype not in TYPES or q.shape[-1] not in (64, 128):
        return f"attention is made for bf16 and fp16, heads of 64 and 128, not {q.dtype}, {q.shape}"
    return serves(q)


@contextmanager
def _stream(x: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, with that device current."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream().cuda_stream


def _launch(kernel: Callable[..., None], on: Tensor, *arguments: Tensor | float | None) -> None:
    """Tensors go as addresses, None as 0."""
    plain = (x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments)
    with _stream(on) as stream:
        kernel(*plain, stream)


def _problem(turns: Turns, q: Tensor, k: Tensor) -> tuple[Tensor | float, ...]:
    return (
        TYPES[q.dtype], q.shape[2], q.shape[1], k.shape[1], min(turns.chunk, FAR),
        min(turns.clamp, FAR), turns.scale, turns.cos, turns.sin,
    )  # fmt: skip


def attention_forward(
    turns: Turns, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp (T, Hq)) of un-rotated q (T, Hq, D), k and v (T, Hkv, D)."""
    turned = rotary.turn(k, rotary.places(cu_k, turns.chunk), turns.cos, turns.sin)
    borders = cu_q.tolist(), cu_k.tolist()
    work = query_tiles(*borders, turns.offset, turns.chunk, QUERIES).to(q.device)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    _launch(
        _cuda.attention_forward, q, *_problem(turns, q, k), len(k), work, len(work),
        q, turned, v, out, lse,
    )  # fmt: skip
    return out, lse
