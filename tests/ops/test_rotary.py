"""Rotary angles against complex arithmetic, YaRN's against transformers."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from q3mega.model.attention import Positions
from q3mega.model.config import shape_of
from q3mega.ops import rotary


def test_rotation_is_complex_multiplication() -> None:
    x = torch.randn(7, 3, 16, dtype=torch.float64)
    position, freq = torch.tensor([0, 1, 5, 9, 262_143, 3, 2]), rotary.inv_freq(16, 1e4)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(
        torch.ones(7, 1, 8, dtype=torch.float64), position[:, None, None] * freq.double()
    )
    ours = rotary.rotate(x, position, freq)
    torch.testing.assert_close(ours, torch.cat([turned.real, turned.imag], -1))
    single = rotary.rotate(x.float(), position, freq)  # angles stay exact far out
    torch.testing.assert_close(single, ours.float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(rotary.rotate(x[None], position, freq)[0], ours)


def test_frequencies() -> None:
    assert rotary.inv_freq(4, 100.0).tolist() == pytest.approx([1.0, 0.1])
    assert rotary.yarn_attention_factor(4.0) == pytest.approx(1.138629, abs=1e-6)
    assert rotary.yarn_attention_factor(1.0) == 1.0


DEPLOYED = {"factor": 4.0, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize(
    ("head_dim", "base", "rope"),
    [
        (128, 1e6, DEPLOYED),  # as Qwen3's model card says
        (128, 1e6, DEPLOYED | {"factor": 1.0}),
        (128, 1e6, DEPLOYED | {"truncate": False}),
        (64, 1e4, DEPLOYED | {"factor": 32.0, "beta_fast": 16, "beta_slow": 2}),
        (128, 5e6, DEPLOYED | {"factor": 2.5, "attention_factor": 0.7}),
        (128, 1e6, DEPLOYED | {"mscale": 1.0, "mscale_all_dim": 0.5}),
        (128, 1e6, DEPLOYED | {"mscale": 1.0}),  # alone it is nothing
        (16, 1e4, {"factor": 4.0, "original_max_position_embeddings": 64}),  # ends beyond the pairs
        (16, 1e4, {"factor": 4.0, "original_max_position_embeddings": 4}),  # both ends at pair 0
        (64, 1e4, {"factor": None, "original_max_position_embeddings": 512}),
    ],
)
def test_yarn_is_that_of_transformers(tmp_path, head_dim, base, rope) -> None:
    rope = {"rope_type": "yarn", "rope_theta": base} | rope
    config = Qwen3Config(head_dim=head_dim, max_position_embeddings=4096, rope_parameters=rope)
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    config.save_pretrained(tmp_path)
    shape = shape_of(tmp_path)
    ours = Positions(shape.rope_base, shape.yarn)
    torch.testing.assert_close(ours.inv_freq(head_dim), theirs, rtol=2e-6, atol=0)
    assert ours.logit_scale == pytest.approx(factor**2, rel=1e-12)
