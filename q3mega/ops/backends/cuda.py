"""The CUDA kernels of csrc/cuda, on Hopper: rows of fp32 logits, attention in bf16 and fp16.

Products with a few rows of the lm_head come from Triton, to which CUDA would add nothing. The
kernels are compiled for sm_90a and tested by emulation on a CPU; they have not yet run on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from q3mega import _cuda
from q3mega.kernels import DIVERGENCES
from q3mega.kernels.tiles import key_tiles, query_tiles
from q3mega.ops import rotary
from q3mega.ops.rotary import RotaryTables

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1}  # Attention::type of csrc/cuda/kernels.h
TILE_ROWS = 128  # queries or keys of a tile
MAX_CHUNK = 1 << 30  # beyond every token; twice that fits an int32


def serves(x: Tensor) -> str | None:
    """Why the backend cannot take the operand, or None."""
    if not x.is_cuda:
        return f"the tensors are on {x.device}"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major != 9:
        return f"the kernels are made for compute capability 9.0 (Hopper), not {major}.{minor}"
    return "fp64 is the reference's" if x.dtype == torch.float64 else None


def serves_attention(q: Tensor) -> str | None:
    """The same of attention's queries."""
    fits = q.dtype in DTYPE_CODES and q.shape[-1] in (64, 128)
    made_for = "its attention is made for bf16 and fp16 and heads of 64 or 128"
    return serves(q) or (None if fits else made_for)


@contextmanager
def _stream(x: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, with that device current."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream().cuda_stream


def _launch(kernel: Callable[..., None], on: Tensor, *arguments: Any) -> None:
    """Tensors go as addresses, None as 0."""
    with _stream(on) as stream:
        kernel(*map(_address_or_number, arguments), stream)


def _address_or_number(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument or 0


def row_stats(z: Tensor, columns: int, column: Tensor) -> Tensor:
    """(n, 4): max m, sum e^(z-m), sum e^(z-m)(z-m), z of the target (0 for -1) of z (n, V)."""
    stats = z.new_empty(len(z), 4)
    _launch(_cuda.row_stats, z, z, *z.shape, columns, column, stats)
    return stats


def row_gradient(
    z: Tensor,
    columns: int,
    column: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    g_entropy: Tensor | None,
) -> None:
    """In place: the gradient of sum g log p + g_entropy H with respect to z (n, V)."""
    _launch(_cuda.row_gradient, z, z, *z.shape, columns, column, lse, entropy, g, g_entropy)


def divergence_sums(
    student: Tensor,
    teacher: Tensor,
    columns: int,
    lse_student: Tensor,
    lse_teacher: Tensor,
    divergence: str,
    beta: float,
) -> Tensor:
    """(n, 2): a KL and 0, or KL(T || M) and KL(S || M), of logits (n, V)."""
    sums = student.new_empty(len(student), 2)
    _launch(
        _cuda.divergence_sums, student, student, teacher, *student.shape, columns, lse_student,
        lse_teacher, DIVERGENCES[divergence], beta, sums,
    )  # fmt: skip
    return sums


def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    columns: int,
    lse_student: Tensor,
    lse_teacher: Tensor,
    divergence: str,
    beta: float,
    student_part: Tensor,
    g: Tensor,
) -> None:
    """In place: the gradient of sum g divergence with respect to `student`.

    student_part (n,): the part of a row's divergence whose expectation is the student's.
    """
    _launch(
        _cuda.divergence_gradient, student, student, teacher, *student.shape, columns, lse_student,
        lse_teacher, DIVERGENCES[divergence], beta, student_part, g,
    )  # fmt: skip


def picked_logits(hidden: Tensor, weight: Tensor, picked: Tensor) -> Tensor:
    """(n, K) fp32 logits of hidden (n, H) by the picked rows (n, K) of weight alone; 0 for -1."""
    return _triton("picked_logits", hidden, weight, picked)


def picked_d_hidden(dz: Tensor, weight: Tensor, picked: Tensor) -> Tensor:
    """(n, H) fp32 from the gradient (n, K) of picked_logits."""
    return _triton("picked_d_hidden", dz, weight, picked)


def picked_d_weight(dz: Tensor, hidden: Tensor, picked: Tensor, d_weight: Tensor) -> None:
    """Adds to d_weight (V, H) fp32 from the gradient (n, K) of picked_logits, in no fixed order."""
    _triton("picked_d_weight", dz, hidden, picked, d_weight)


def _triton(kernel: str, *tensors: Tensor) -> Any:
    from q3mega.kernels import distill_loss  # here, since all else does without Triton

    with torch.cuda.device(tensors[0].device):
        return getattr(distill_loss, kernel)(*tensors)


def _problem(tables: RotaryTables, q: Tensor, k: Tensor, tile_list: Tensor) -> _cuda.Attention:
    arguments = (
        DTYPE_CODES[q.dtype], q.shape[2], q.shape[1], k.shape[1], len(q), len(k),
        min(tables.chunk, MAX_CHUNK), min(tables.clamp, MAX_CHUNK), tables.scale, tables.cos,
        tables.sin, tile_list, len(tile_list),
    )  # fmt: skip
    return _cuda.Attention(*map(_address_or_number, arguments))


def attention_forward(
    tables: RotaryTables, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp (T, Hq)) of un-rotated q (T, Hq, D), k and v (T, Hkv, D)."""
    rotated_k = rotary.rotate_by_tables(
        k, rotary.positions_in_chunk(cu_k, tables.chunk), tables.cos, tables.sin
    )
    cut = cu_q.tolist(), cu_k.tolist(), tables.offset, tables.chunk, TILE_ROWS
    tile_list = query_tiles(*cut).to(q.device)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    problem = _problem(tables, q, k, tile_list)
    _launch(_cuda.attention_forward, q, problem, q, rotated_k, v, out, lse)
    return out, lse


def attention_backward(
    tables: RotaryTables, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    if not len(q):
        return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    positions = rotary.positions_in_chunk(cu_k, tables.chunk)
    rotated_k = rotary.rotate_by_tables(k, positions, tables.cos, tables.sin)
    delta = (d_out.float() * out.float()).sum(-1)
    cut = cu_q.tolist(), cu_k.tolist(), tables.offset, tables.chunk, TILE_ROWS
    operands = d_out, q, rotated_k, v, lse, delta
    d_q, d_v = torch.empty_like(q), torch.empty_like(v)
    d_rotated_k = torch.empty_like(k, dtype=torch.float32)
    tile_list = query_tiles(*cut).to(q.device)
    _launch(_cuda.attention_query_gradient, q, _problem(tables, q, k, tile_list), *operands, d_q)
    tile_list = key_tiles(*cut).to(q.device)
    _launch(
        _cuda.attention_key_gradient,
        q,
        _problem(tables, q, k, tile_list),
        *operands,
        d_rotated_k,
        d_v,
    )
    d_k = rotary.rotate_by_tables(d_rotated_k, positions, tables.cos, -tables.sin)
    return d_q, d_k.to(k.dtype), d_v
