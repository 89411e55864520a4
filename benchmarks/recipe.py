"""What the operators do for a recipe: the same steps on their fast backends and on their fronts.

    python benchmarks/recipe.py [--rounds 3]

Each row runs the first steps of examples/laptop.yaml's pre-training, as it is and with a larger
vocabulary or longer sequences, in turn with and without Q3MEGA_BACKEND=reference. Speed is the
median over rounds of the median step; memory the highest sum of the processes' proportional set
sizes, sampled four times a second.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

STEPS = 40
CASES = {
    "as it is: vocabulary 512, sequences of 256": [],
    "vocabulary 8,192": ["tokenizer.vocab_size=8192"],
    "sequences of 2,048": ["pretrain_general.sequence=2048"],
}
RECIPE = Path(__file__).parent.parent / "examples" / "laptop.yaml"


def run(overrides: list[str], backend: str | None) -> tuple[float, float]:
    """(tokens a second, GiB)."""
    environment = dict(os.environ) | ({"Q3MEGA_BACKEND": backend} if backend else {})
    with tempfile.TemporaryDirectory() as folder:
        short = [f"pretrain_general.steps={STEPS}", *overrides]
        command = [sys.executable, "-m", "q3mega", "run", str(RECIPE), "--run-dir", folder]
        process = subprocess.Popen(
            [*command, "--only", "pretrain_general", *short],
            env=environment, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.25)
        if process.returncode:
            raise SystemExit(process.returncode)
        [metrics] = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    times = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(rows[4:])]
    tokens = statistics.mean(row["tokens"] for row in rows[5:])
    return tokens / statistics.median(times), peak / 2**30


def _resident(pid: int) -> int:
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(p.memory_full_info().pss for p in family)
    except psutil.Error:  # one of them ended in between
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print("| pre-training | tokens/s, fronts | fast | ratio | GiB, fronts | fast |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, overrides in CASES.items():
        rates_by_backend: dict[str | None, list[tuple[float, float]]] = {"reference": [], None: []}
        for _ in range(rounds):
            for backend, results in rates_by_backend.items():
                results.append(run(overrides, backend))
        (slow, much), (fast, little) = (
            tuple(statistics.median(column) for column in zip(*results, strict=True))
            for results in rates_by_backend.values()
        )
        cells = f"{slow:,.0f} | {fast:,.0f} | {fast / slow:.2f} | {much:.2f} | {little:.2f}"
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
