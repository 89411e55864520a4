"""Model-based reward without a reference: a preference model's scalar, made a score in [0, 1]."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from q3mega.rewards.registry import Verdict, reward

WIDEST = 30.0  # standard deviations; beyond them the logistic is 0 or 1 and exp would overflow


@reward("preference")
def preference_of_stage(completion: str, row: Mapping[str, Any]) -> Verdict:
    """The verdict that the stage's preference model gave on the whole batch before."""
    return row["scored"]["preference"]


def preference(scalars: Sequence[float], mean: float, std: float) -> list[Verdict]:
    """Logistic of the scalar, centred on typical replies: mean and std are measured on them.

    Raises RuntimeError for scalars that are not finite, or a model that tells no replies apart.
    """
    if not (math.isfinite(mean) and 0 < std < math.inf and all(map(math.isfinite, scalars))):
        raise RuntimeError(f"the preference model gave mean={mean}, std={std}, scores {scalars}")
    widths = [max(-WIDEST, min(WIDEST, (s - mean) / std)) for s in scalars]
    return [
        Verdict(1 / (1 + math.exp(-w)), f"preference {s:.2f}")
        for w, s in zip(widths, scalars, strict=True)
    ]
