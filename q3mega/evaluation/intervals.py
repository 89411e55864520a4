"""Means with 95 % intervals, and pass@k."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TypeVar

_T = TypeVar("_T")
Z95 = 1.959964


def proportion(outcomes: Iterable[float]) -> dict[str, float]:
    """{value, n, low, high} of outcomes: Wilson's 95 % interval where all are in [0, 1] (exact 0/1
    or graded), else the normal one."""
    values = list(outcomes)
    n, p = len(values), sum(values) / max(1, len(values))
    if not n:
        return {"value": 0.0, "n": 0, "low": 0.0, "high": 1.0}
    if min(values) < 0 or max(values) > 1:
        half = Z95 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
        return {"value": p, "n": n, "low": p - half, "high": p + half}
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"value": p, "n": n, "low": min(low, p), "high": max(high, p)}  # rounding at 0 and 1


def averages(scores: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """`proportion` of each problem's mean score over its tries; the interval counts problems.

    What could not be judged (None) is left out, and `unjudged` is its share where there is any.
    """
    judged = [_judged(tries) for tries in scores]
    means = proportion(statistics.fmean(tries) for tries in judged if tries)
    total, left = sum(map(len, scores)), sum(map(len, judged))
    return means if left == total else means | {"unscored_fraction": 1 - left / total}


def pass_at_k(correct: Sequence[Sequence[bool | None]], k: int) -> dict[str, float]:
    """Unbiased pass@k over problems (Chen et al., 2107.03374): 1 - C(n-c, k) / C(n, k).

    A problem of which fewer than k tries could be judged is left out.
    """
    values = []
    for tries in map(_judged, correct):
        n, c = len(tries), sum(tries)
        if n >= k:
            values.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    return proportion(values)


def _judged(scores: Iterable[_T | None]) -> list[_T]:
    return [score for score in scores if score is not None]
