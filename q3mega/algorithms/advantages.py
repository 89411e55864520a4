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
