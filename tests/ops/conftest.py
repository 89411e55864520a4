"""Several processes of a test file over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import q3mega


@pytest.fixture
def ranks(tmp_path: Path):
    """ranks(file, world, *arguments): runs `file rank world store *arguments` once a rank."""

    def run(file: str, world: int, *arguments: str) -> None:
        root = str(Path(q3mega.__file__).resolve().parents[1])
        env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen(
                [sys.executable, file, str(rank), str(world), str(tmp_path / "store"), *arguments],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            logs = [w.communicate(timeout=120)[0] for w in workers]
        finally:
            for w in workers:
                w.kill()
        assert [w.returncode for w in workers] == [0] * world, "\n".join(logs)

    return run
