"""What a benchmark compares computes the same: the timed code, at small sizes."""

from collections.abc import Callable
from functools import partial

import pytest

from q3mega import device  # noqa: F401

# isort: split
import operators
import torch
from operators import Case, Target

CASES: dict[str, Callable[[Target], Case]] = {
    "grpo": partial(operators.grpo, n=64, h=16),
    "grpo, masked and idle": partial(operators.grpo, n=64, h=16, masked=0.5, idle=0.3),
    "forward_kl": partial(operators.distill, n=24, h=16, kind="forward_kl"),
    "reverse_kl": partial(operators.distill, n=24, h=16, kind="reverse_kl"),
    "jsd": partial(operators.distill, n=24, h=16, kind="jsd"),
    "topk": partial(operators.topk, n=24, h=16, k=8),
    "attention": partial(
        operators.attention, s=300, heads=2, kv_heads=2, chunk_size=80, local_size=20, dim=64
    ),
}
ANOTHER = {"SDPA causal", "products"}  # without chunks, and without a loss


@pytest.mark.slow  # Liger and torch.compile compile
@pytest.mark.parametrize("name", CASES)
def test_implementations_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "VOCABULARY", 1024)
    case = CASES[name](Target("cpu", torch.float32))
    assert {"cpu", "eager"} < case.runs.keys()
    found = {}
    for implementation in case.runs.keys() - ANOTHER:
        operators._run(case, implementation, "cpu")
        value = case.runs[implementation]().detach()
        found[implementation] = [value, *(x.grad for x in case.leaves)]
    for implementation, values in found.items():
        for value, expected in zip(values, found["eager"], strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                value, expected, rtol=1e-4, atol=1e-4 * scale,
                msg=lambda text, who=implementation: f"{who}: {text}",
            )  # fmt: skip
