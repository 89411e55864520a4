"""What clipping and correction are worth when a batch feeds eight updates and is one step old.

    python benchmarks/off_policy.py RUN/04-cold_start/hf [--batches 32] [--runs runs/off_policy]

Reasoning RL of examples/laptop.yaml from the same checkpoint, again and again, on as many rollouts:
on-policy (one update a batch; and as many updates as off-policy, from batches of an eighth), and
off-policy with clipping and correction, with clipping alone, with neither; from a mixture of
experts also with routing replay. Prints accuracy on held-out problems before and after, and the
share of the first one's gain. A run that is there is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from q3mega.config.recipe import ModelSpec
from q3mega.model.config import shape_of

RECIPE = Path(__file__).parent.parent / "examples" / "laptop.yaml"
UPDATES = 8
LATE = {"schedule": "one_step_off", "updates": UPDATES}
SMALL = "on-policy, small batches"
NO_CLIP = {"clip_low": 1.0, "clip_high": 1e6}
CASES: dict[str, dict[str, object]] = {
    "on-policy": {"updates": 1},
    SMALL: {"updates": 1},
    "off-policy, clip + TIS": LATE | {"rollout_correction": "tis"},
    "off-policy, clip": LATE,
    "off-policy, neither": LATE | NO_CLIP,
}
MIXTURE: dict[str, dict[str, object]] = {
    "off-policy, clip + TIS, R2": LATE | {"rollout_correction": "tis", "routing_replay": "r2"},
    "off-policy, clip + TIS, R3": LATE | {"rollout_correction": "tis", "routing_replay": "r3"},
    "off-policy, clip, R2": LATE | {"routing_replay": "r2"},
    "off-policy, clip, R3": LATE | {"routing_replay": "r3"},
}


def run(start: Path, folder: Path, recipe: Path, settings: dict[str, object]) -> Path:
    """The folder of a finished reasoning RL stage."""
    given = [f"reasoning_rl.{name}={value}" for name, value in settings.items()]
    given += [f"reasoning_rl.init={start}", f"tokenizer.path={start}", "tokenizer.vocab_size=null"]
    shape = asdict(shape_of(start)).items()  # the recipe's may be another, and dense
    given += [f"model.{n}={json.dumps(v)}" for n, v in shape if n in ModelSpec.model_fields]
    command = [sys.executable, "-m", "q3mega", "run", str(recipe), "--run-dir", str(folder)]
    subprocess.run([*command, "--only", "reasoning_rl", *given], check=True, stdout=sys.stderr)
    [stage] = folder.glob("*-reasoning_rl")
    return stage


def measured(stage: Path) -> tuple[dict[str, float], list[float]]:
    """Accuracy (value, low, high) after; mean gap, clipped share and entropy of the last tenth."""
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "gap" in row]
    last = rows[-max(1, len(rows) // 10) :]
    means = [
        statistics.fmean(r[name] for r in last)
        for name in ("logprob_mismatch", "clip_fraction", "entropy")
    ]
    return json.loads((stage / "eval.json").read_text())["think_accuracy"], means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("start", type=Path, help="a cold start's hf folder, eval.json beside it")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--batches", type=int, default=32, help="off-policy rollout batches")
    parser.add_argument("--prompts", type=int, default=64, help="an off-policy batch")
    parser.add_argument("--runs", type=Path, default=Path("runs/off_policy"))
    parser.add_argument("--without", nargs="*", default=[], help="names of runs to leave out")
    args = parser.parse_args()
    start = args.start.resolve()
    before = json.loads((start.parent / "eval.json").read_text())["think_accuracy"]["value"]
    print(f"accuracy before: {before:.3f}\n")
    print("| run | accuracy | 95 % interval | of the on-policy gain | gap | clipped | entropy |")
    print("|---|---|---|---|---|---|---|", flush=True)
    on_policy = None
    cases = CASES | (MIXTURE if shape_of(start).experts else {})
    for name, settings in cases.items():
        if name in args.without:
            continue
        parts = UPDATES if name == SMALL else 1  # batches that one is cut into
        sizes = {"steps": args.batches * parts, "prompts": max(1, args.prompts // parts)}
        folder = args.runs / name.replace(", ", "-").replace(" ", "")
        after, means = measured(run(start, folder, args.recipe, settings | sizes))
        gain = after["value"] - before
        on_policy = gain if on_policy is None else on_policy
        share = f"{gain / on_policy:.0%}" if on_policy > 0 else "none"
        interval = f"{after['low']:.3f} to {after['high']:.3f}"
        numbers = " | ".join(f"{x:.3g}" for x in means)
        print(f"| {name} | {after['value']:.3f} | {interval} | {share} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
