"""Corrections for tokens that another policy sampled than the one that starts to learn from them.

The other policy has the sampler's numerics, or older weights. A token's policy loss is multiplied
by its importance weight, which follows from d: log p of the trainer at the start of the batch's
updates, less log p of the sampler.
  tis            min(exp d, cap): truncated importance weights
  mis            exp d within the band, 0 outside of it: masked importance weights
  sequence_mask  0 for a whole completion of negative advantage with mean(-d) > delta, else 1
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from q3mega.errors import UserError


@dataclass(frozen=True)
class RolloutCorrection:
    """cap, band: of exp d. delta: nats a token, an estimate of KL(sampler || trainer)."""

    kind: Literal["tis", "mis", "sequence_mask"]
    cap: float = 2.0
    band: tuple[float, float] = (0.5, 2.0)
    delta: float = 0.5

    def importance_weights(
        self, trainer: NDArray[np.float64], sampler: NDArray[np.float64], advantage: float
    ) -> NDArray[np.float64]:
        """(n,) from the (n,) log-probabilities of the tokens that the model chose.

        Raises UserError when one of them is not finite.
        """
        d = trainer - sampler
        if not np.isfinite(d).all():
            raise UserError(
                f"rollout_correction={self.kind}: a log-probability of {len(d)} tokens is not "
                "finite; check the sampler, which must give that of every sampled token"
            )
        if self.kind == "tis":
            return np.exp(np.minimum(d, np.log(self.cap)))
        if self.kind == "mis":
            low, high = np.log(self.band)
            inside = (d >= low) & (d <= high)
            return np.exp(np.where(inside, d, 0.0)) * inside
        return np.full_like(d, 0.0 if advantage < 0 and np.mean(-d) > self.delta else 1.0)
