"""What Transformer Engine would change, where it is not: grouped experts, fp8's sizes, the refusal.

Its grouped layers are stood in for by plain ones under the same names and in megatron's own
TEGroupedMLP, so that the experts' weight map and order are held to those of the sequential ones.
"""

from functools import partial

import pytest

from q3mega import device

# isort: split
import torch
import torch.nn.functional as F
from helpers.tiny_models import LAYOUT, SHAPES, documents
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

from q3mega.algorithms.losses import normalise, supervised
from q3mega.data.batch import pack
from q3mega.engine import Engine, OptimizerSpec, parallel
from q3mega.errors import UserError
from q3mega.model import megatron
from q3mega.model.reader import Reader

SPEC = OptimizerSpec(lr=1e-2, steps=10)


class GroupedLinear(torch.nn.Module):
    """Transformer Engine's names: weight0, weight1, ... of (outputs, inputs)."""

    def __init__(self, count: int, inputs: int, outputs: int, /, **_: object) -> None:
        super().__init__()
        self.count = count
        for i in range(count):
            self.register_parameter(
                f"weight{i}", torch.nn.Parameter(0.02 * torch.randn(outputs, inputs))
            )

    def forward(self, x: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, None]:
        parts = x.split(counts)
        return torch.cat(
            [F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)]
        ), None


class Provider(LocalSpecProvider):
    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> object:
        assert moe_use_grouped_gemm
        return partial(TEGroupedMLP, submodules=GroupedMLPSubmodules(GroupedLinear, GroupedLinear))


def test_grouped_experts_are_the_sequential_ones(tmp_path, monkeypatch) -> None:
    sequential = Engine(SHAPES["moe"], LAYOUT(), seed=1, optimizer=SPEC)
    sequential.save_hf(tmp_path / "start", {})
    with monkeypatch.context() as patch:
        patch.setattr(device, "HAS_TRANSFORMER_ENGINE", True)
        patch.setattr(megatron, "_provider", lambda: Provider)
        grouped = Engine(SHAPES["moe"], LAYOUT(), seed=2, optimizer=SPEC)
    experts = grouped.chunks[0].decoder.layers[0].mlp.experts
    assert isinstance(experts, TEGroupedMLP) and not experts.linear_fc1.weight0.allreduce
    grouped.load_hf(tmp_path / "start")
    batches = pack(normalise(documents(0)), 200)
    found = [engine.train_step(batches, supervised) for engine in (sequential, grouped)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for name, engine in (("sequential", sequential), ("grouped", grouped)):
        engine.save_hf(tmp_path / name, {})
    a, b = (Reader(tmp_path / n, SHAPES["moe"]) for n in ("sequential", "grouped"))
    assert a.where.keys() == b.where.keys()
    for name in a.where:
        torch.testing.assert_close(a(name), b(name), atol=1e-6, rtol=1e-5)


def test_filling_up_for_fp8_changes_nothing(monkeypatch) -> None:
    batches = pack(normalise(documents(0)), 200)
    found = []
    for multiple in (1, 16):
        cut = partial(
            parallel.shard_for_context_parallel, sequence_parallel=False, multiple=multiple
        )
        assert all(len(cut(b).batch) % multiple == 0 for b in batches)
        engine = Engine(SHAPES["tied"], LAYOUT(), seed=1, optimizer=SPEC)
        monkeypatch.setattr(engine, "_part", cut)
        found.append([engine.train_step(batches, supervised) for _ in range(2)])
    assert found[0] == [pytest.approx(x, rel=1e-5) for x in found[1]]


@pytest.mark.skipif(device.HAS_TRANSFORMER_ENGINE, reason="it is here")
def test_fp8_without_transformer_engine_is_refused() -> None:
    with pytest.raises(UserError, match="fp8=true needs a GPU and Transformer Engine"):
        Engine(SHAPES["tied"], LAYOUT(), seed=1, fp8=True)
