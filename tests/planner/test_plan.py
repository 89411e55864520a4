"""The planner against published throughput and memory (benchmarks/published.py has the rows).

The rates were fitted to these rows, so this holds the fit, and no more: it is no forecast.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from published import A3B, A22B, EP16, MEMORY, PUBLISHED, errors, job

from q3mega.config.layout import Layout
from q3mega.config.recipe import Recipe
from q3mega.model import QWEN3
from q3mega.planner.cost import CARDS, GIB, by_stage, memory, sent, step
from q3mega.planner.plan import best, stages, table_of_stages

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_step_times_are_near_the_published_ones() -> None:
    found = errors()
    assert statistics.median(map(abs, found.values())) <= 0.15
    assert {n: e for n, e in found.items() if abs(e) > 0.35} == {}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_near_the_published_one(name: str) -> None:
    planned, _ = PUBLISHED[name]
    assert sum(memory(planned).values()) / GIB == pytest.approx(MEMORY[name], rel=0.1)


def test_useful_flops_are_the_accounting_of_the_field() -> None:
    shape = QWEN3[A22B]
    assert 3 * shape.forward_flops(1, 2048) == pytest.approx(148.3e9, rel=0.01)


@pytest.mark.parametrize(
    ("better", "worse"),
    [({"overlap": True}, {}), ({"graphs": True}, {}), ({}, {"forced": False}),
     ({}, {"dispatch": "all_to_all"}), ({}, {"recompute": "full"})],
)  # fmt: skip
def test_what_helps_helps(better: dict[str, Any], worse: dict[str, Any]) -> None:
    base = job(A3B, **EP16)
    assert step(replace(base, **better)).seconds < step(replace(base, **worse)).seconds


def test_the_best_layouts_fit_and_are_sorted() -> None:
    found = best(job(A3B, 16, 1024, forced=False), 16)
    assert found
    assert all(sum(memory(j).values()) <= CARDS["h100"].memory for j in found)
    times = [step(j).seconds for j in found]
    assert times == sorted(times)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gpus", "batch"), [(A3B, 16, 1024), (A22B, 256, 2048)])
def test_what_fits_is_what_megatron_builds(model: str, gpus: int, batch: int) -> None:
    for found in best(job(model, gpus, batch), gpus, count=1):
        planned = by_stage(found)
        for rank, stage in {0: 0, gpus - 1: len(planned) - 1}.items():
            script = Path(__file__).parents[1] / "helpers" / "meta_device_rank.py"
            words = str(rank), model, found.layout.model_dump_json()
            done = subprocess.run(
                [sys.executable, str(script), *words], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-2000:]
            for component, built in json.loads(done.stdout.splitlines()[-1]).items():
                assert planned[stage][component] == pytest.approx(built, rel=0.02), component


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_fits_its_cluster(path: Path) -> None:
    table, fits = table_of_stages(Recipe.load(path), "h100")
    assert fits, table


def test_what_a_rank_sends() -> None:
    alone = job(A3B, 1, 4)
    assert sum(sent(alone).values()) == 0
    shape, tokens = QWEN3[A3B], 4096
    two = replace(alone, layout=Layout(processes=2), batch=2)  # a micro-batch each
    assert sent(two)["data"] == pytest.approx(3 * shape.num_parameters(), rel=0.01)
    two = replace(alone, layout=Layout(processes=2, pipeline=2), batch=1)
    assert sent(two)["pipeline"] == tokens * shape.hidden * 2  # one of two has one way to send
    two = replace(alone, layout=Layout(processes=2, context=2), batch=1)
    keys_and_values = shape.layers * tokens / 2 * shape.kv_heads * shape.head_dim * 2 * 2
    assert sent(two)["context"] == pytest.approx(2 * keys_and_values)  # and their gradients
    full = sent(replace(two, recompute="full"))["context"]
    assert full == pytest.approx(3 * keys_and_values)


@pytest.mark.parametrize("stage", ["reasoning_rl", "general_rl"])
def test_a_reference_policy_takes_room(stage: str) -> None:
    def needed(kl_coef: float) -> float:
        recipe = Recipe.load(EXAMPLES / "qwen3_32b.yaml", [f"{stage}.kl_coef={kl_coef}"])
        return next(p for p in stages(recipe, CARDS["h100"]) if p.stage == stage).needed[0]

    assert needed(0.1) > needed(0.0)


@pytest.mark.parametrize(
    ("stage", "at", "parts"),
    [
        ("distill_on_policy", "teacher_url=tcp://node9:29600", ("teacher",)),
        ("distill_off_policy", "teacher_url=http://node9:8000", ("teacher", "kv_cache")),
    ],
)
def test_a_teacher_elsewhere_takes_no_room_here(
    stage: str, at: str, parts: tuple[str, ...]
) -> None:
    def planned(*overrides: str) -> Any:
        given = [f"{stage}.{word}" for word in overrides]
        recipe = Recipe.load(EXAMPLES / "laptop.yaml", given)
        return next(p for p in stages(recipe, CARDS["h100"]) if p.stage == stage)

    k = "teacher_topk=64" if "http" in at else "compare_sft_samples=0"
    here, elsewhere = planned(), planned(at, k)
    assert here.memory[0].keys() - elsewhere.memory[0].keys() == set(parts)
    assert "teacher" not in elsewhere.seconds
