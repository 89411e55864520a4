"""The C++ kernels of csrc/cpu, fp32 on a CPU, built for AVX-512 and for AVX2.

The AVX-512 build is taken where torch takes its own: ATEN_CPU_CAPABILITY=avx2 narrows both.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from q3mega.kernels import DIVERGENCES
from q3mega.ops.rotary import RotaryTables

AVX512_BUILD = ("_cpu_avx512",) if "AVX512" in torch.backends.cpu.get_cpu_capability() else ()
BUILDS = [name for name in (*AVX512_BUILD, "_cpu") if find_spec(f"q3mega.{name}")]  # the best first
_cpu = import_module(f"q3mega.{BUILDS[0]}")


def serves(x: Tensor) -> str | None:
    """Why the backend cannot take the operand, or None."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}"
    return "fp64 is the reference's" if x.dtype == torch.float64 else None


serves_attention = serves


def build() -> str:
    """Where the kernels that serve lie; their name says for which vectors."""
    return str(_cpu.__file__)


def row_stats(z: Tensor, columns: int, column: Tensor) -> Tensor:
    """(n, 4): max m, sum e^(z-m), sum e^(z-m)(z-m), z of the target (0 for -1) of z (n, V)."""
    stats = z.new_empty(len(z), 4)
    _cpu.row_stats(z.data_ptr(), *z.shape, columns, column.data_ptr(), stats.data_ptr())
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
    _cpu.row_gradient(
        z.data_ptr(), *z.shape, columns, column.data_ptr(), lse.data_ptr(), entropy.data_ptr(),
        g.data_ptr(), 0 if g_entropy is None else g_entropy.data_ptr(),
    )  # fmt: skip


def divergence_sums(
    student: Tensor,
    teacher: Tensor,
    columns: int,
    lse_student: Tensor,
    lse_teacher: Tensor,
    divergence: str,
    beta: float,
) -> Tensor:
    """(n, 2): a KL and 0, or KL(T || M) and KL(S || M), of logits (n, V).

    The latter leave ln(S / M) in `teacher`, for divergence_gradient."""
    sums = student.new_empty(len(student), 2)
    _cpu.divergence_sums(
        student.data_ptr(), teacher.data_ptr(), *student.shape, columns, lse_student.data_ptr(),
        lse_teacher.data_ptr(), DIVERGENCES[divergence], beta, sums.data_ptr(),
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
    _cpu.divergence_gradient(
        student.data_ptr(), teacher.data_ptr(), *student.shape, columns, lse_student.data_ptr(),
        lse_teacher.data_ptr(), DIVERGENCES[divergence], beta, student_part.data_ptr(),
        g.data_ptr(),
    )  # fmt: skip


def picked_logits(hidden: Tensor, weight: Tensor, picked: Tensor) -> Tensor:
    """(n, K) logits of hidden (n, H) by the picked rows (n, K) of weight alone; 0 for -1."""
    logits = hidden.new_empty(picked.shape)
    _cpu.picked_logits(
        *_addresses(hidden, weight, picked), *picked.shape, hidden.shape[1], logits.data_ptr()
    )
    return logits


def picked_d_hidden(dz: Tensor, weight: Tensor, picked: Tensor) -> Tensor:
    """(n, H) from the gradient (n, K) of picked_logits."""
    d_hidden = dz.new_empty(len(dz), weight.shape[1])
    _cpu.picked_d_hidden(
        *_addresses(dz, weight, picked), *picked.shape, weight.shape[1], d_hidden.data_ptr()
    )
    return d_hidden


def picked_d_weight(dz: Tensor, hidden: Tensor, picked: Tensor, d_weight: Tensor) -> None:
    """Adds to d_weight (V, H) from the gradient (n, K) of picked_logits."""
    _cpu.picked_d_weight(
        *_addresses(dz, hidden, picked), *picked.shape, hidden.shape[1], d_weight.data_ptr()
    )


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    assert all(x.dtype in (torch.float32, torch.int64) for x in tensors)
    return tuple(x.data_ptr() for x in tensors)


def _shape(
    tables: RotaryTables, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[float, ...]:
    return (
        len(cu_k) - 1, q.shape[1], *k.shape[1:], cu_q.data_ptr(), cu_k.data_ptr(), tables.offset,
        tables.chunk, tables.clamp, tables.cos.data_ptr(), tables.sin.data_ptr(), tables.scale,
    )  # fmt: skip


def attention_forward(
    tables: RotaryTables, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp (T, Hq)) of un-rotated q (T, Hq, D), k and v (T, Hkv, D)."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    pointers = (x.data_ptr() for x in (q, k, v, out, lse))
    _cpu.dual_chunk_forward(*_shape(tables, q, k, cu_q, cu_k), *pointers)
    return out, lse


def attention_backward(
    tables: RotaryTables, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    pointers = (x.data_ptr() for x in (q, k, v, out, lse, d_out, *grads))
    _cpu.dual_chunk_backward(*_shape(tables, q, k, cu_q, cu_k), *pointers)
    return grads
