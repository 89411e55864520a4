"""A stage's own evaluation comes out the same whichever way its processes split the work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).with_name("tiny.yaml")


def run(folder: Path, *overrides: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "q3mega.cli", "run", str(RECIPE), "--run-dir", str(folder)]
    stage = overrides[0]
    done = subprocess.run(
        [*command, "--only", stage, *overrides[1:]], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [path] = folder.glob(f"*-{stage}/eval.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.dist
def test_layouts_evaluate_alike(tmp_path: Path) -> None:
    first = "pretrain_general", "pretrain_general.steps=2", "pretrain_general.save_every=2"
    found = {
        layout: run(tmp_path / layout.replace("=", "_"), *first, "model.kv_heads=2", *words)
        for layout, words in {
            "data=2": [],
            "pipeline=2": ["layout.pipeline=2"],
            "tensor=2": ["layout.tensor=2", "layout.sequence_parallel=true"],
            "context=2": ["layout.context=2"],
        }.items()
    }
    expected = found.pop("data=2")
    for layout, results in found.items():
        assert results.keys() == expected.keys()
        for name, result in results.items():
            assert result["value"] == pytest.approx(expected[name]["value"], rel=1e-3), layout
