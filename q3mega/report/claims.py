"""The recipe's claims, each with the bar it is held to and how a run's results are judged by it.

A judge reads stage -> metric -> {value, n, low, high} and raises KeyError where a stage has not
run. Accuracies and rates are fractions; "points" are hundredths of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Evals = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    text: str
    bar: str
    measure: Callable[[Evals], tuple[str, bool]]

    def judge(self, evals: Evals) -> tuple[str, bool | None]:
        """What was measured, and whether the bar is met; None where a stage has not run, or what it
        measured is no number (null)."""
        try:
            return self.measure(evals)
        except (KeyError, TypeError):
            return "", None


def _at_least(stage: str, metric: str, bar: float) -> Callable[[Evals], tuple[str, bool]]:
    def measure(evals: Evals) -> tuple[str, bool]:
        value = evals[stage][metric]["value"]
        return f"{value:.3f}", value >= bar

    return measure


def _keeps_thinking(stage: str) -> Callable[[Evals], tuple[str, bool]]:
    def measure(evals: Evals) -> tuple[str, bool]:
        before = evals["reasoning_rl"]["think_accuracy"]["value"]
        after = evals[stage]["think_accuracy"]["value"]
        return f"{before:.3f} → {after:.3f}", _reaches(after - before, -0.05)

    return measure


def _rl_lifts(evals: Evals) -> tuple[str, bool]:
    before, after = (evals[s]["think_accuracy"] for s in ("cold_start", "reasoning_rl"))
    apart = after["low"] > before["high"]
    text = f"{before['value']:.3f} → {after['value']:.3f}, intervals {'apart' if apart else 'meet'}"
    return text, apart and _reaches(after["value"] - before["value"], 0.25)


def _thinking_pays(evals: Evals) -> tuple[str, bool]:
    with_it, without = (
        evals["mode_fusion"][m]["value"] for m in ("think_accuracy", "no_think_accuracy")
    )
    return f"{with_it:.3f} against {without:.3f}", _reaches(with_it - without, 0.30)


def _budget(evals: Evals) -> tuple[str, bool]:
    curve = evals["mode_fusion"]["curves"]["thinking_budget"]
    answered = evals["mode_fusion"]["answered_min"]["value"]
    points = sorted(zip(curve["x"], curve["y"], curve["low"], curve["high"], strict=True))
    # No later point lies below an earlier one by more than their intervals allow.
    rising = all(b[3] >= a[2] for i, a in enumerate(points) for b in points[i + 1 :])
    first, last = points[0][1], points[-1][1]
    text = f"{first:.3f} → {last:.3f}, {'rising' if rising else 'not monotone'}"
    met = rising and _reaches(last - first, 0.40) and answered >= 0.95
    return f"{text}, {answered:.3f} answered", met


def _capabilities(evals: Evals) -> tuple[str, bool]:
    before, after = evals["mode_fusion"], evals["general_rl"]
    gains = {
        name: metric["value"] - before[name]["value"]
        for name, metric in after.items()
        if name.startswith("capability_")
    }
    if not gains:
        raise KeyError("capability_*")
    up = sum(gain > 0 for gain in gains.values())
    worst = min(gains.values())
    text = f"{up} of {len(gains)} up, the least {100 * worst:+.1f} points"
    return text, up >= 4 and _reaches(worst, -0.03)


def _long_context(evals: Evals) -> tuple[str, bool]:
    ours, plain = (
        evals["pretrain_long"][f"retrieval_4x_{kind}"]["value"] for kind in ("yarn_dca", "rope")
    )
    return f"{ours:.3f} against {plain:.3f}", ours >= 2 * plain and ours >= 0.60


def _distilled(metric: str, gain: float) -> Callable[[Evals], tuple[str, bool]]:
    def measure(evals: Evals) -> tuple[str, bool]:
        off, on = (evals[f"distill_{p}_policy"][metric]["value"] for p in ("off", "on"))
        return f"{off:.3f} → {on:.3f}", on > off and _reaches(on - off, gain)

    return measure


def _cheaper_than_rl(evals: Evals) -> tuple[str, bool]:
    results = evals["distill_on_policy"]
    ours, rl, ratio = (
        results[m]["value"] for m in ("pass1", "rl_pass1", "flops_ratio_rl_over_opd")
    )
    return f"{ours:.3f} against {rl:.3f}, RL took {ratio:.1f}x", ours >= rl and ratio >= 5


def _reaches(difference: float, bar: float) -> bool:
    """`difference` >= `bar`, forgiving the rounding of a subtraction (0.8 - 0.55 < 0.25)."""
    return difference >= bar - 1e-9


CLAIMS = [
    Claim(
        "Long-context training with YaRN and dual-chunk attention retrieves beyond its length",
        "at 4x the length: ≥ 2x plain RoPE, and ≥ 0.60",
        _long_context,
    ),
    Claim(
        "Reinforcement learning teaches reasoning beyond the cold start",
        "≥ 25 points, 95 % intervals apart",
        _rl_lifts,
    ),
    Claim(
        "Entropy holds during reasoning RL",
        "last / first entropy ≥ 0.5",
        _at_least("reasoning_rl", "entropy_ratio", 0.5),
    ),
    Claim(
        "After fusion one model obeys /think and /no_think",
        "≥ 0.95 of answers in the mode asked for",
        _at_least("mode_fusion", "mode_obedience", 0.95),
    ),
    Claim(
        "General RL makes mode switching reliable",
        "≥ 0.98 of answers in the mode asked for",
        _at_least("general_rl", "mode_obedience", 0.98),
    ),
    Claim(
        "Fusion keeps the thinking",
        "at most 5 points below reasoning RL",
        _keeps_thinking("mode_fusion"),
    ),
    Claim(
        "General RL keeps the thinking",
        "at most 5 points below reasoning RL",
        _keeps_thinking("general_rl"),
    ),
    Claim(
        "Thinking pays in the fused model",
        "thinking ≥ 30 points over not thinking",
        _thinking_pays,
    ),
    Claim(
        "Accuracy follows the thinking budget, which was never trained",
        "non-decreasing within intervals, ≥ 40 points from end to end, ≥ 0.95 answered",
        _budget,
    ),
    Claim(
        "General RL lifts broad capabilities",
        "≥ 4 of 5 up, none down by more than 3 points",
        _capabilities,
    ),
    Claim(
        "On-policy distillation lifts pass@1 over off-policy",
        "≥ 15 points",
        _distilled("pass1", 0.15),
    ),
    Claim(
        "On-policy distillation lifts pass@8 as well",
        "higher than off-policy",
        _distilled("pass8", 0.0),
    ),
    Claim(
        "On-policy distillation beats RL on the student at a fraction of the cost",
        "pass@1 at least RL's, RL's FLOPs ≥ 5x",
        _cheaper_than_rl,
    ),
]
