"""Divergences of a student's distribution to its teacher's, row by row of their logits, in Triton.

Memory-bound passes over two blocks of logits, and products with a few rows of an lm_head a token;
`csrc/cpu/distill_loss.cpp` computes the same.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from q3mega.kernels import DIVERGENCES, block_columns

FORWARD, REVERSE = tl.constexpr(0), tl.constexpr(1)
PICKS, LANES = 16, 256  # of picked rows and of their columns at once


@triton.jit
def _log_mixture(p, q, beta):
    """ln of beta p + (1 - beta) q; of 0 a finite number, so that 0 times it is 0."""
    return tl.log(tl.maximum(beta * p + (1.0 - beta) * q, 1e-37))


@triton.jit
def _terms(lq, lp, beta, KIND: tl.constexpr):
    """What a column adds to the two sums of a row."""
    q, p = tl.exp(lq), tl.exp(lp)
    if KIND == FORWARD:
        x, y = p * (lp - lq), 0.0 * p
    elif KIND == REVERSE:
        x, y = q * (lq - lp), 0.0 * q
    else:
        lm = _log_mixture(p, q, beta)
        x, y = p * (lp - lm), q * (lq - lm)
    return x, y


@triton.jit
def divergence_sums_kernel(
    S, T, LSE_S, LSE_T, SUMS, stride, columns, beta, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of a row's divergence, one program a row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    shift_s, shift_t = tl.load(LSE_S + row), tl.load(LSE_T + row)
    for start in range(0, columns, BLOCK):
        v = start + lane
        lq = tl.load(S + row * stride + v, mask=v < columns, other=0.0) - shift_s
        lp = tl.load(T + row * stride + v, mask=v < columns, other=0.0) - shift_t
        x, y = _terms(lq, lp, beta, KIND)
        first += tl.where(v < columns, x, 0.0)
        second += tl.where(v < columns, y, 0.0)
    tl.store(SUMS + 2 * row, tl.sum(first, 0))
    tl.store(SUMS + 2 * row + 1, tl.sum(second, 0))


@triton.jit
def divergence_gradient_kernel(
    S,
    T,
    LSE_S,
    LSE_T,
    STUDENT_PART,
    G,
    stride,
    columns,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of a row's divergence by the student's logits."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * stride + v, v < columns
    g, student_part = tl.load(G + row), tl.load(STUDENT_PART + row)
    lq = tl.load(S + at, mask=inside, other=0.0) - tl.load(LSE_S + row)
    lp = tl.load(T + at, mask=inside, other=0.0) - tl.load(LSE_T + row)
    q, p = tl.exp(lq), tl.exp(lp)
    if KIND == FORWARD:
        dz = g * (q - p)
    elif KIND == REVERSE:
        dz = g * q * (lq - lp - student_part)
    else:
        dz = g * (1.0 - beta) * q * (lq - _log_mixture(p, q, beta) - student_part)
    tl.store(S + at, tl.where(inside, dz, 0.0), mask=v < stride)


@triton.jit
def _load_picked(PICKED, at, ok, X, width, h):
    """(picks, lanes) fp32 of the rows of X that PICKED names; 0 for -1."""
    row_of_weight = tl.load(PICKED + at, mask=ok, other=-1)[:, None]
    inside = (row_of_weight >= 0) & (h < width)[None]
    return tl.load(X + row_of_weight * width + h[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def picked_logits_kernel(
    HIDDEN, WEIGHT, PICKED, LOGITS, picks, width, PICKS: tl.constexpr, LANES: tl.constexpr
):
    """Logits of the teacher's best tokens alone."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * PICKS + tl.arange(0, PICKS)
    dots = tl.zeros((PICKS, LANES), tl.float32)
    for start in range(0, width, LANES):
        h = start + tl.arange(0, LANES)
        x = tl.load(HIDDEN + row * width + h, mask=h < width, other=0.0).to(tl.float32)
        dots += _load_picked(PICKED, row * picks + k, k < picks, WEIGHT, width, h) * x[None]
    tl.store(LOGITS + row * picks + k, tl.sum(dots, 1), mask=k < picks)


@triton.jit
def picked_d_hidden_kernel(
    DZ, WEIGHT, PICKED, D_HIDDEN, picks, width, PICKS: tl.constexpr, LANES: tl.constexpr
):
    """Gradient by the hidden states, through the picked tokens."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * LANES + tl.arange(0, LANES)
    parts = tl.zeros((PICKS, LANES), tl.float32)
    for start in range(0, picks, PICKS):
        k = start + tl.arange(0, PICKS)
        dz = tl.load(DZ + row * picks + k, mask=k < picks, other=0.0)
        parts += _load_picked(PICKED, row * picks + k, k < picks, WEIGHT, width, h) * dz[:, None]
    tl.store(D_HIDDEN + row * width + h, tl.sum(parts, 0), mask=h < width)


@triton.jit
def picked_d_weight_kernel(DZ, HIDDEN, PICKED, D_WEIGHT, picks, width, LANES: tl.constexpr):
    """Gradient by the picked rows of the weight."""
    pick = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * LANES + tl.arange(0, LANES)
    row_of_weight, dz = tl.load(PICKED + pick), tl.load(DZ + pick)
    inside = (h < width) & (row_of_weight >= 0)
    x = tl.load(HIDDEN + pick // picks * width + h, mask=inside, other=0.0).to(tl.float32)
    tl.atomic_add(D_WEIGHT + row_of_weight * width + h, dz * x, mask=inside, sem="relaxed")


def divergence_sums(
    student: Tensor, teacher: Tensor, columns: int, lse_student: Tensor, lse_teacher: Tensor,
    divergence: str, beta: float,
) -> Tensor:  # fmt: skip
    """(n, 2) sums over the first `columns` of logits (n, V): forward or reverse KL and 0, or of the
    Jensen-Shannon divergence KL(T || M) and KL(S || M)."""
    sums = student.new_empty(len(student), 2)
    divergence_sums_kernel[(len(student),)](
        student, teacher, lse_student, lse_teacher, sums, student.shape[1], columns, beta,
        DIVERGENCES[divergence], block_columns(columns), num_warps=8,
    )  # fmt: skip
    return sums


def divergence_gradient(
    student: Tensor, teacher: Tensor, columns: int, lse_student: Tensor, lse_teacher: Tensor,
    divergence: str, beta: float, student_part: Tensor, g: Tensor,
) -> None:  # fmt: skip
    """In place: the gradient of sum g divergence by the logits `student` (n, V).

    student_part (n,): the part of a row's divergence whose expectation is the student's.
    """
    block = block_columns(student.shape[1])
    divergence_gradient_kernel[len(student), triton.cdiv(student.shape[1], block)](
        student, teacher, lse_student, lse_teacher, student_part, g, student.shape[1], columns,
        beta, DIVERGENCES[divergence], block, num_warps=8,
    )  # fmt: skip


def picked_logits(hidden: Tensor, weight: Tensor, picked: Tensor) -> Tensor:
    """(n, K) fp32 logits of hidden (n, H) by the picked rows (n, K) of weight alone; 0 for -1."""
    (n, picks), width = picked.shape, hidden.shape[1]
    logits = torch.empty(n, picks, device=hidden.device, dtype=torch.float32)
    picked_logits_kernel[n, triton.cdiv(picks, PICKS)](
        hidden, weight, picked, logits, picks, width, PICKS, LANES
    )
    return logits


def picked_d_hidden(dz: Tensor, weight: Tensor, picked: Tensor) -> Tensor:
    """(n, H) fp32 from the gradient (n, K) of picked_logits."""
    (n, picks), width = picked.shape, weight.shape[1]
    d_hidden = dz.new_empty(n, width)
    picked_d_hidden_kernel[n, triton.cdiv(width, LANES)](
        dz, weight, picked, d_hidden, picks, width, PICKS, LANES
    )
    return d_hidden


def picked_d_weight(dz: Tensor, hidden: Tensor, picked: Tensor, d_weight: Tensor) -> None:
    """Adds to d_weight (V, H) fp32 from the gradient (n, K) of picked_logits, in no fixed order."""
    width = hidden.shape[1]
    picked_d_weight_kernel[picked.numel(), triton.cdiv(width, LANES)](
        dz, hidden, picked, d_weight, picked.shape[1], width, LANES
    )
