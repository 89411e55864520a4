"""Advantages of GRPO's family: what a completion is worth beside the others of its prompt."""

from collections.abc import Sequence

import numpy as np


def group_advantages(rewards: Sequence[float], *, scale_by_std: bool = True) -> list[float] | None:
    """(r - mean) / std within a prompt's group (DeepSeekMath 2402.03300); Dr. GRPO leaves std out.

    None when all rewards are equal: such a group teaches nothing and is dropped (DAPO 2503.14476).
    """
    r = np.asarray(rewards, dtype=np.float64)
    if r.max() - r.min() < 1e-9:
        return None
    centred = r - r.mean()
    return (centred / r.std() if scale_by_std else centred).tolist()


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """0 up to limit - buffer tokens, then linearly to -1 at limit (DAPO's soft punishment)."""
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer)) if buffer else 0.0
