"""What importing the engine changes, and what starting one does."""

import subprocess
import sys

import pytest
import torch

from q3mega.engine import megatron_patches

IMPORTED = """
import typing, torch
before = torch.compile, hasattr(typing, "override")
import q3mega.engine, q3mega.inference, q3mega.stages.common.stage, q3mega.distillation.topk
assert (torch.compile, hasattr(typing, "override")) == before
assert torch.ones(2).type() == "torch.FloatTensor"
try:
    torch.zeros(2, device="cuda")
except (AssertionError, RuntimeError):
    print("its own torch")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_importing_the_engine_leaves_torch_alone():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert done.stdout.strip() == "its own torch", done.stderr


def test_another_megatron_is_told(monkeypatch, caplog):
    megatron_patches._check_version()
    assert not caplog.records
    monkeypatch.setattr(megatron_patches.megatron.core, "__version__", "0.20.0")
    megatron_patches._check_version()
    assert "megatron-core is 0.20.0, and its patches are for 0.19.2" in caplog.text
