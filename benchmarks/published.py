"""Published training throughput on H100s, as the planner's jobs: `python benchmarks/published.py`
prints predicted beside published, `--fit` searches for rates that come nearer.

bf16 unless said, sequences of 4,096 unless said. From Megatron-Bridge's performance pages (2025-09
to 2026-07) and the Megatron MoE model zoo (2026-05). Where a page does not say which dispatcher
ran, an all-to-all is taken, overlapped from release 26.02.01 on. Left out: token-drop and FSDP
runs, and fine-tuning runs whose batch or layout was not published.
"""

import random
import statistics
import sys
from dataclasses import asdict, replace
from typing import Any

from q3mega.config.layout import Layout
from q3mega.model import QWEN3
from q3mega.planner.cost import RATES, Job, Rates, step

A3B, A22B = "qwen3-30b-a3b", "qwen3-235b-a22b"


def job(model: str, gpus: int, batch: int, *, context: int = 1, **fields: Any) -> Job:
    axes = ("tensor", "pipeline", "virtual_pipeline", "expert")
    split = {axis: fields.pop(axis) for axis in axes if axis in fields}
    layout = Layout(
        processes=gpus, context=context, sequence_parallel=split.get("tensor", 1) > 1, **split
    )
    return Job(QWEN3[model], layout, batch=batch, **{"forced": True} | fields)


def plain(**fields: Any) -> dict[str, Any]:
    return {"dispatch": "all_to_all", **fields}


EP16 = {"gpus": 16, "batch": 1024, "expert": 16}
PP2 = {"gpus": 16, "pipeline": 2, "expert": 8, "precision": "fp8"}
ZOO = {"gpus": 256, "tensor": 2, "pipeline": 8, "virtual_pipeline": 4, "expert": 32}
LONG = {"gpus": 256, "batch": 256, "tensor": 4, "pipeline": 8, "virtual_pipeline": 4, "expert": 8}
LONG |= {"recompute": "experts"}
FP8 = plain(**ZOO, precision="fp8", overlap=True)

# (job, published TFLOP/s a GPU)
PUBLISHED = {
    "30B HybridEP, overlap": (job(A3B, **EP16, overlap=True, graphs=True), 299.4),
    "30B A/B, without overlap": (job(A3B, **EP16, graphs=True), 244.0),
    "30B A/B, overlap": (job(A3B, **EP16, overlap=True, graphs=True), 287.3),
    "30B natural routing": (job(A3B, **EP16, graphs=True, forced=False), 199.1),
    "30B all-to-all": (job(A3B, **plain(**EP16)), 146.0),
    "30B all-to-all, overlap": (job(A3B, **plain(**EP16, overlap=True)), 192.4),
    "30B fp8, 26.06": (job(A3B, **plain(**EP16, precision="fp8", overlap=True)), 203.0),
    "30B fp8, 26.04": (job(A3B, **plain(**EP16, precision="fp8", overlap=True)), 205.0),
    "30B fp8 PP2 VP12, 26.02.01": (
        job(A3B, **plain(**PP2, batch=1024, virtual_pipeline=12, overlap=True)), 208.0,
    ),
    "30B fp8 PP2 VP12, 26.02": (job(A3B, **plain(**PP2, batch=1024, virtual_pipeline=12)), 118.0),
    "30B fp8 PP2 VP24, 25.11": (
        job(A3B, **plain(**PP2, batch=512, micro_batch=2, virtual_pipeline=24)), 121.0,
    ),
    "235B DeepEP": (job(A22B, **ZOO, batch=2048, recompute="norms"), 245.0),
    "235B DeepEP, overlap": (
        job(A22B, **ZOO, batch=2048, recompute="norms", overlap=True), 276.0,
    ),
    "235B DeepEP, overlap, graphs": (
        job(A22B, **ZOO, batch=2048, recompute="norms", overlap=True, graphs=True), 320.0,
    ),
    "235B TP2 PP32 EP8": (
        job(
            A22B, 256, 2048, tensor=2, pipeline=32, virtual_pipeline=3, expert=8,
            recompute="norms", dispatch="all_to_all",
        ),
        200.0,
    ),
    "235B TP4 PP8 EP8": (
        job(
            A22B, 256, 2048, tensor=4, pipeline=8, virtual_pipeline=4, expert=8, recompute="norms"
        ),
        167.0,
    ),
    "235B fp8, 26.04.01": (job(A22B, **FP8, batch=8192), 253.0),
    "235B fp8, 26.04": (job(A22B, **FP8, batch=8192), 250.0),
    "235B fp8, 26.02.01": (job(A22B, **FP8, batch=8192), 238.0),
    "235B fp8, 26.02": (job(A22B, **FP8, batch=8192), 242.0),
    "235B fp8, 25.11": (job(A22B, **FP8, batch=2048), 233.0),
    "8B": (job("qwen3-8b", 16, 1024), 512.7),
} | {
    f"235B {16 * ways}K, {'forced' if forced else 'natural'}": (
        job(A22B, **LONG, sequence=16_384 * ways, context=ways, forced=forced), published,
    )
    for forced, row in ((True, (295.0, 335.0, 368.0, 389.0)), (False, (237.0, 277.0, 320.0, 357.0)))
    for ways, published in zip((1, 2, 4, 8), row, strict=True)
}  # fmt: skip


MEMORY = {"30B HybridEP, overlap": 62.2}  # GiB, rank 0
LIMITS = {  # what is physical: shares of a peak, and what cannot be hidden or lost
    "projection": (0.3, 0.85), "attention": (0.3, 0.75), "expert": (0.2, 0.6),
    "traffic": (0.4, 0.9), "link": (0.2, 0.9), "all_to_all": (0.2, 0.8),
    "fused_dispatch": (0.3, 1.0), "hidden": (0.2, 0.9), "launch": (2e-4, 3e-3),
    "launch_dense": (0.1, 0.6), "graphs": (0.1, 1.0), "permute": (1.0, 4.0), "casts": (1.0, 3.0),
    "skew": (1.1, 1.6),
}  # fmt: skip


def errors(rates: Rates = RATES) -> dict[str, float]:
    """Of the predicted step times, relative."""
    return {
        name: published * 1e12 / step(job, rates).flops - 1
        for name, (job, published) in PUBLISHED.items()
    }


def loss(rates: Rates) -> float:
    sizes = [abs(e) for e in errors(rates).values()]
    return sum(e**1.5 for e in sizes) + sum(5 * max(0.0, e - 0.28) for e in sizes)


def fit(rounds: int = 8000) -> Rates:
    """Random search within LIMITS."""
    rng, fitted, width = random.Random(0), RATES, 0.15
    for i in range(rounds):
        moved = {
            name: min(max(value * 2 ** (rng.gauss(0, width)), low), high)
            for name, (low, high) in LIMITS.items()
            if (value := asdict(fitted)[name]) and rng.random() < 0.4
        }
        tried = replace(fitted, **moved)
        if loss(tried) < loss(fitted):
            fitted = tried
        if i % 2000 == 1999:
            width /= 2
    return fitted


def main() -> None:
    rates = fit() if "--fit" in sys.argv else RATES
    if rates is not RATES:
        print({name: float(f"{value:.3g}") for name, value in asdict(rates).items()})
    errors_by_run = errors(rates)
    print("| run | published TFLOP/s a GPU | predicted | step time off by |\n|---|---|---|---|")
    for name, (job, published) in PUBLISHED.items():
        predicted = step(job, rates).flops / 1e12
        print(f"| {name} | {published} | {predicted:.0f} | {errors_by_run[name]:+.0%} |")
    off = [abs(e) for e in errors_by_run.values()]
    print(f"\nmedian {statistics.median(off):.1%}, worst {max(off):.0%}")


if __name__ == "__main__":
    main()
