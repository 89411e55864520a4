"""Model-based reward without a reference: a preference model's scalar, made a score in [0, 1]."""

import math
from collections.abc import Sequence

from q3mega.rewards import Verdict


def preference(scalars: Sequence[float], mean: float, std: float) -> list[Verdict]:
    """Logistic of the scalar, centred on typical replies: mean and std are measured on them."""
    width = std or 1.0
    scores = [1 / (1 + math.exp(-max(-30.0, min(30.0, (s - mean) / width)))) for s in scalars]
    return [Verdict(p, f"preference {s:.2f}") for p, s in zip(scores, scalars, strict=True)]
