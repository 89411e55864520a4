"""One thread a process, no network, no deadlines, and GPU tests only where there is a GPU."""

import os

# Before torch is imported, and inherited by every process that a test starts: sums then have one
# order, and processes do not fight over the cores.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("q3mega", deadline=None)
hypothesis.settings.load_profile("q3mega")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
