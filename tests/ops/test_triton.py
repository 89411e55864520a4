"""The Triton kernels in Triton's interpreter against the reference in float64.

The interpreter must be asked for before Triton is imported, so the checks run in a process of
their own, this file; its shapes are small because the interpreter is slow.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKS = ("logprob", "grpo", "distill", "topk", "picked", "packed", "continued")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__, check], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_the_interpreter_a_cpu_is_refused() -> None:
    from q3mega import ops

    x, w = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        ops.linear_logprob(x, w, torch.tensor([0, 1, 2]), backend="triton")


def _both(run, *leaves: torch.Tensor, atol: float = 2e-5) -> None:
    """run(backend, *leaves) gives (scalar, other outputs): triton in fp32 is the fp64 reference."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        scalar, *others = run(backend, *inputs)
        results.append([scalar.detach(), *others, *torch.autograd.grad(scalar, inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=2e-4)


def _main(check: str) -> None:
    from q3mega import ops
    from q3mega.kernels import dual_chunk_attention
    from q3mega.ops.backends import KERNELS

    torch.manual_seed(0)
    n, v, h, valid = 7, 37, 6, 33
    leaves, targets = (torch.randn(n, h), torch.randn(v, h)), torch.randint(valid, (n,))
    w = torch.rand(n)
    w[::3] = 0.0
    if check == "logprob":

        def logprob(backend, hidden, weight):
            actual = ops.linear_logprob(
                hidden, weight, targets, temperature=0.7, valid_vocab=valid, backend=backend
            )
            return sum((x * w).sum() for x in actual), *(x.detach() for x in actual)

        _both(logprob, *leaves)
    elif check == "grpo":
        advantages, old = torch.randn(n), torch.randn(n) - 4

        def grpo(variant, backend, hidden, weight):
            typed = (x.to(hidden.dtype) for x in (advantages, old, w, old + 0.1))
            rows = ("advantages", "old_logprobs", "loss_weights", "ref_logprobs")
            out = ops.grpo_loss(
                hidden, weight, targets, **dict(zip(rows, typed, strict=True)), variant=variant,
                kl_coef=0.1, entropy_coef=0.1, seq_ids=torch.arange(n) // 4, backend=backend,
            )  # fmt: skip
            return out.loss, out.logprobs, out.entropy, out.clip_fraction, out.kl

        for variant in ("grpo", "cispo", "gspo"):
            _both(partial(grpo, variant), *leaves)
    elif check in ("distill", "topk"):
        teacher, head = torch.randn(n, 4), torch.randn(v, 4)
        logprobs, ids = torch.randn(n, v).log_softmax(-1)[:, :valid].topk(4)

        def distill(kind, backend, hidden, weight):
            dtype = hidden.dtype
            if check == "topk":
                given = {"teacher_topk": (ids, logprobs.to(dtype)), "tail": kind != "jsd"}
            else:
                given = {"teacher_hidden": teacher.to(dtype), "teacher_weight": head.to(dtype)}
            out = ops.distill_loss(
                hidden, weight, **given, divergence=kind, beta=0.3, temperature=1.3,
                loss_weights=w.to(dtype), valid_vocab=None if check == "topk" else valid,
                backend=backend,
            )  # fmt: skip
            return out.loss, out.per_token

        for kind in ("forward_kl", "reverse_kl", "jsd"):
            _both(partial(distill, kind), *leaves)
    elif check == "picked":
        hidden, weight, dz = torch.randn(5, 300), torch.randn(v, 300).bfloat16(), torch.randn(5, 20)
        picked = torch.randint(-1, v, (5, 20))  # -1 is nowhere, and some come twice
        there = torch.zeros(5, 20, v).scatter_(2, picked.clamp(min=0)[..., None], 1.0)
        there *= (picked >= 0)[..., None]
        triton, d_weight = KERNELS["triton"], torch.ones(v, 300)
        triton.picked_d_weight(dz, hidden, picked, d_weight)
        of_logits = torch.einsum("nk,nkv->nv", dz, there)
        for ours, theirs in (
            (
                triton.picked_logits(hidden, weight, picked),
                torch.einsum("nkv,nv->nk", there, hidden @ weight.float().T),
            ),
            (triton.picked_d_hidden(dz, weight, picked), of_logits @ weight.float()),
            (d_weight, 1 + of_logits.T @ hidden),
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    else:
        small = dual_chunk_attention.Tiles(16, 16)
        dual_chunk_attention.tiles = dual_chunk_attention.forward_tiles = lambda _: small
        lengths, offset = ([5, 40, 1], 0) if check == "packed" else ([41], 30)
        total = sum(lengths)
        q, k, values = (torch.randn(total, heads, 12) for heads in (4, 2, 2))
        scales = {"q_scale": 1 + torch.rand(total - offset), "k_scale": 1 + torch.rand(total)}
        where = (
            {"q_offset": offset}
            if offset
            else {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
        )
        pull = torch.randn(total - offset, 4, 12)

        def attend(backend, q, k, v):
            out = ops.dual_chunk_attention(
                q, k, v, chunk_size=16, local_size=4, rope_theta=100.0, backend=backend,
                **where, **scales,
            )  # fmt: skip
            return (out * pull).sum(), out.detach()

        _both(attend, q[offset:], k, values, atol=1e-4)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    _main(sys.argv[1])
