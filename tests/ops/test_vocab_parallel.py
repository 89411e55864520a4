"""Processes that each hold a part of the lm_head equal one process, in values and gradients."""

import sys

import pytest
import torch
import torch.distributed as dist

from q3mega import ops

N, V, H = 12, 12, 6


@pytest.mark.dist
@pytest.mark.parametrize(
    ("backend", "world"), [("reference", 2), ("reference", 4), ("cpu", 2), ("cpu", 4)]
)
def test_processes_equal_one(ranks, backend: str, world: int) -> None:
    ranks(__file__, world, backend)


def worker(rank: int, world: int, store: str, backend: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    g = torch.Generator().manual_seed(0)

    dtype = torch.float32 if backend == "cpu" else torch.float64
    near = 2e-4 if backend == "cpu" else 1e-11

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=g)

    hidden, weight, t_hidden, t_weight = randn(N, H), 2 * randn(V, H), randn(N, H), randn(V, H)
    part = slice(rank * V // world, (rank + 1) * V // world)
    columns = {k: 0.3 * randn(N) for k in ("advantages", "old_logprobs", "ref_logprobs")}
    columns["loss_weights"] = torch.rand(N, generator=g).to(dtype) * (torch.arange(N) % 4 > 0)
    top = randn(N, V).log_softmax(-1).topk(3)

    def compare(op, valid: int | None) -> None:
        results = []
        for w, t, tp in ((weight, t_weight, None), (weight[part], t_weight[part], group)):
            h, w = hidden.clone().requires_grad_(), w.clone().requires_grad_()
            outs = op(h, w, t, valid_vocab=valid, tp_group=tp, backend=backend)
            loss = sum((o * torch.arange(1, o.numel() + 1)).sum() for o in outs if o.requires_grad)
            loss.backward()
            cut = part if tp is None else slice(None)
            results.append([*(o.detach() for o in outs), h.grad, w.grad[cut]])
        torch.testing.assert_close(*results, atol=near, rtol=near)

    for valid in (None, 8, 4):  # 4: the last ranks hold padding alone
        targets = torch.randint(valid or V, (N,), generator=g)

        def logprob(h, w, t, targets=targets, **kw):
            return ops.linear_logprob(h, w, targets, temperature=0.8, **kw)

        compare(logprob, valid)
        for variant in ("grpo", "gspo", "cispo"):

            def grpo(h, w, t, targets=targets, variant=variant, **kw):
                return ops.grpo_loss(
                    h, w, targets, **columns, seq_ids=torch.arange(N) // 5, variant=variant,
                    kl_coef=0.1, entropy_coef=0.1, **kw,
                )  # fmt: skip

            compare(grpo, valid)
        for kind in ("forward_kl", "reverse_kl", "jsd"):

            def full(h, w, t, kind=kind, **kw):
                return ops.distill_loss(
                    h, w, teacher_hidden=t_hidden, teacher_weight=t, divergence=kind,
                    temperature=1.5, **kw,
                )  # fmt: skip

            compare(full, valid)
            for tail in (True, False):

                def topk(h, w, t, kind=kind, tail=tail, **kw):
                    ids = top.indices % (kw["valid_vocab"] or V)
                    ids = (ids[:, :1] + torch.arange(3)) % (kw["valid_vocab"] or V)  # distinct
                    return ops.distill_loss(
                        h, w, teacher_topk=(ids, top.values), divergence=kind, tail=tail, **kw
                    )

                compare(topk, valid)
    ops.linear_logprob(hidden[:0], weight[part], targets[:0], tp_group=group)
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
