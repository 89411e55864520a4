"""A small engine, a batch, and a way to run a script under several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def torchrun():
    """torchrun(script, processes, *arguments) -> rank 0's last printed line, from JSON."""

    def run(script: str, processes: int, *arguments: str):
        path = Path(__file__).parent / script
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
