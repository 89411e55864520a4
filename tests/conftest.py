"""One thread a process, no network, no deadlines, and GPU tests only where there is a GPU."""

import os

# Before torch is imported, and inherited by every process that a test starts: sums then have one
# order, and processes do not fight over the cores.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.path.dirname(__file__),  # helpers, in those processes
}

import json
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("q3mega", deadline=None)
hypothesis.settings.load_profile("q3mega")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests only where there is one. The longest file comes first, beside it those of one
    process, and last those that start several processes."""
    several = {item.path for item in items if item.get_closest_marker("dist")}
    items.sort(key=lambda i: (i.path.name != "test_whole_recipe.py", i.path in several))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def torchrun():
    """torchrun(script, processes, *arguments) -> rank 0's last printed line, from JSON.

    script: the name of a program in tests/helpers.
    """

    def run(script: str, processes: int, *arguments: str):
        path = Path(__file__).parent / "helpers" / script
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        done = subprocess.run(
            [*command, str(path), *arguments],
            capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
