"""A stage's own evaluation comes out the same whichever way its processes split the work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).with_name("tiny.yaml")
SEQUENCE = "pretrain_general.layout.sequence_parallel=true"


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
    given = "pretrain_general", "pretrain_general.steps=2", "model.kv_heads=2"
    run(tmp_path / "start", *given)  # random weights would depend on where the layers are built
    init = f"pretrain_general.init={tmp_path / 'start' / '01-pretrain_general' / 'hf'}"
    found = {
        layout: run(tmp_path / layout.replace("=", "_"), *given, init, *words)
        for layout, words in {
            "data=2": [],
            "pipeline=2": ["pretrain_general.layout.pipeline=2"],
            "tensor=2": ["pretrain_general.layout.tensor=2", SEQUENCE],
            "context=2": ["pretrain_general.layout.context=2"],
        }.items()
    }
    expected = found.pop("data=2")
    for layout, results in found.items():
        assert results.keys() == expected.keys()
        for name, result in results.items():
            assert result["value"] == pytest.approx(expected[name]["value"], rel=1e-3), layout
