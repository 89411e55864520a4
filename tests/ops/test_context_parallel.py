"""Ranks that each hold pieces of every document equal one rank, in values and gradients."""

import sys

import pytest
import torch
import torch.distributed as dist

from q3mega import ops
from q3mega.errors import UserError
from q3mega.ops.context_parallel import context_parallel_attention, zigzag


@pytest.mark.parametrize("size", [1, 2, 4])
def test_zigzag_deals_every_token_once_and_the_work_evenly(size):
    cu_seqlens = torch.tensor([0, 16, 16, 40])
    held = [zigzag(cu_seqlens, rank, size) for rank in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(40))
    starts = torch.tensor([0] * 16 + [16] * 24)
    keys = [int((tokens - starts[tokens] + 1).sum()) for tokens in held]
    assert len(set(keys)) == 1


def test_a_document_that_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match="18 tokens cannot be cut into 4"):
        zigzag(torch.tensor([0, 18]), 0, 2)


@pytest.mark.dist
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one(ranks, backend: str, world: int) -> None:
    ranks(__file__, world, backend)


def worker(rank: int, world: int, store: str, backend: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    near = 1e-5 if backend == "cpu" else 1e-12
    g = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 8, 8, 64, 96])  # one document is empty, two are over the chunk
    heads = (4, 2, 2)
    q, k, v, pull = (torch.randn(96, h, 8, dtype=dtype, generator=g) for h in (*heads, 4))
    scales = [1 + 0.1 * torch.rand(96, generator=g) for _ in range(2)]
    options = {"chunk_size": 16, "local_size": 4, "rope_theta": 100.0, "backend": backend}
    held = zigzag(cu_seqlens, rank, world)
    results = []
    for tokens, op, group in (
        (torch.arange(96), ops.dual_chunk_attention, {}),
        (held, context_parallel_attention, {"cp_group": dist.group.WORLD}),
    ):
        operands = [x[tokens].clone().requires_grad_() for x in (q, k, v)]
        out = op(
            *operands, cu_seqlens=cu_seqlens, q_scale=scales[0][tokens], k_scale=scales[1][tokens],
            **group, **options,
        )  # fmt: skip
        (out * pull[tokens]).sum().backward()
        actual = [out.detach(), *(x.grad for x in operands)]
        results.append([x[held] for x in actual] if not group else actual)
    torch.testing.assert_close(*results, atol=near, rtol=near)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
