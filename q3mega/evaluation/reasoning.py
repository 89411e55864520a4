"""Reasoning: accuracy, pass@k, the thinking budget, and entropy over a stage."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from q3mega.data.tokenizer import Tokenizer
from q3mega.evaluation.answers import Mode, accuracy, answer_problems
from q3mega.evaluation.intervals import proportion
from q3mega.io import whole_records
from q3mega.problems import Problem
from q3mega.rollout import Sampler, SamplingParams

MAX_ANSWER_TOKENS = (
    160  # of an answer to a held-out problem, or what the stage allows if that is more
)


def thinking(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    seed: int,
    *,
    mode: Mode | None = None,
    max_tokens: int = MAX_ANSWER_TOKENS,
) -> dict[str, dict[str, float]]:
    """Thinking-mode accuracy on held-out problems at T=0.6 (the report's), T=1 and greedy."""
    results: dict[str, dict[str, float]] = {}
    for name, temperature in (
        ("think_accuracy", 0.6),
        ("think_accuracy_t1", 1.0),
        ("think_accuracy_greedy", 0.0),
    ):
        params = SamplingParams(max_tokens, temperature, seed=seed)
        answered = answer_problems(sampler, tokenizer, problems, params, mode)
        results[name] = accuracy(answered)
        if name == "think_accuracy":
            for family in dict.fromkeys(p.family for p in problems):
                members = [tries for tries in answered if tries[0].problem.family == family]
                results[f"think_accuracy/{family}"] = accuracy(members)
            results["answered"] = proportion(a.answered for tries in answered for a in tries)
    return results


def entropy_ratio(metrics: Path) -> dict[str, dict[str, float]]:
    """Mean token entropy of the last ten RL steps over that of the first ten; nothing where no step
    had a token with a signal."""
    rows = whole_records(metrics)
    values = [row["entropy"] for row in rows if row.get("entropy") is not None]
    if not values:
        return {}
    ratio = float(np.mean(values[-10:]) / np.mean(values[:10]))
    return {"entropy_ratio": {"value": ratio, "n": len(values)}}


def budget_curve(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    budgets: Sequence[int],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Accuracy by thinking budget (Qwen3 report, figure 2), and the smallest share answered."""
    rows, shares = [], []
    for budget in budgets:
        answered = answer_problems(
            sampler, tokenizer, problems, replace(params, thinking_budget=budget), "think"
        )
        rows.append(accuracy(answered))
        shares.append(proportion(a.answered for tries in answered for a in tries))
    curve = {
        "x": list(budgets),
        "y": [r["value"] for r in rows],
        "low": [r["low"] for r in rows],
        "high": [r["high"] for r in rows],
        "xlabel": "thinking budget, tokens",
        "ylabel": "accuracy",
    }
    return curve, min(shares, key=lambda s: s["value"])
