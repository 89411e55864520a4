"""Entropy held by a controller: the report asks that it stay level or rise, and says not how."""

import math
from dataclasses import dataclass


@dataclass
class EntropyController:
    """Bonus coefficient that moves one `step` a rollout batch towards a target entropy.

    As in Skywork-OR1 (2505.22312): up while entropy is below target, down above it, never below 0.
    The target is `hold` times the entropy (nats a token) of the first batch seen.
    """

    hold: float
    step: float
    limit: float
    coefficient: float = 0.0
    target: float | None = None

    def update(self, entropy: float) -> float:
        """Take the last batch's mean entropy, return the coefficient of the next update.

        An entropy that is not finite says nothing, and changes nothing.
        """
        if not math.isfinite(entropy):
            return self.coefficient
        if self.target is None:
            self.target = self.hold * entropy
        direction = 1 if entropy < self.target else -1
        self.coefficient = min(self.limit, max(0.0, self.coefficient + direction * self.step))
        return self.coefficient
