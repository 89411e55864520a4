"""The table of shapes against the exact published counts and FLOPs."""

import pytest

from q3mega.errors import UserError
from q3mega.model import QWEN3, Qwen3Shape

TOTAL = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}
ACTIVE = {
    "qwen3-30b-a3b": (3_353_032_704, 2_730_702_848),
    "qwen3-235b-a22b": (22_190_763_520, 20_946_103_808),
}
GFLOPS_PER_TOKEN = {
    "qwen3-0.6b": (5.0, 14.9),
    "qwen3-8b": (49.0, 74.4),
    "qwen3-235b-a22b": (148.3, 280.8),
}


@pytest.mark.parametrize("name", TOTAL)
def test_parameter_counts(name):
    assert QWEN3[name].num_parameters() == TOTAL[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    shape = QWEN3[name]
    counts = shape.num_parameters(active=True), shape.num_parameters(active=True, embeddings=False)
    assert counts == ACTIVE[name]


@pytest.mark.parametrize("name", GFLOPS_PER_TOKEN)
def test_training_flops_at_4k_and_32k(name):
    got = [3 * QWEN3[name].forward_flops(1, s / 2) / 1e9 for s in (4096, 32_768)]
    assert got == pytest.approx(GFLOPS_PER_TOKEN[name], abs=0.05)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"heads": 3}, "heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"experts": 4, "topk": 5}, "topk=5"),
    ],
)
def test_impossible_shapes_are_named(change, field):
    with pytest.raises(UserError, match=field):
        Qwen3Shape(
            **(
                {"layers": 1, "hidden": 8, "heads": 2, "kv_heads": 2, "ffn": 8, "head_dim": 4}
                | change
            )
        )
