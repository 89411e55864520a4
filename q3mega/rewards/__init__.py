"""Rewards: one file each, one registry. A reward reads text and a row, and says why it gave what.

    @reward("shouting")
    def shouting(completion, row):
        return Verdict(float(completion.isupper()), "all upper case?")

`row` holds a problem's fields (family, answer, messages, meta, ...). Model-based rewards (judge,
preference) need a model and are called with one from the stage that holds it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from q3mega.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """score in [0, 1], and the reason in a few words. Any other score, NaN too, is an error."""

    score: float
    reason: str

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"score={self.score} ({self.reason}): a reward must give 0..1")


Reward = Callable[[str, Mapping[str, Any]], Verdict]
_REWARDS: dict[str, Reward] = {}


def reward(name: str) -> Callable[[Reward], Reward]:
    """Decorator: register `f(completion, row) -> Verdict` under `name`.

    completion: the assistant's raw text, think tags and tool calls included, stop token not.
    """

    def register(fn: Reward) -> Reward:
        _REWARDS[name] = fn
        return fn

    return register


def score(names: str | Sequence[str], completion: str, row: Mapping[str, Any]) -> Verdict:
    """The verdict of one registered reward; of several, the product, with the lowest one's reason.

    Raises UserError for an unknown name.
    """
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in _REWARDS:
            raise UserError(f"reward={name!r} is unknown: use one of {', '.join(sorted(_REWARDS))}")
    verdicts = [_REWARDS[name](completion, row) for name in names]
    lowest, product = verdicts[0], 1.0
    for verdict in verdicts:
        product *= verdict.score
        lowest = min(lowest, verdict, key=lambda v: v.score)
    return Verdict(product, lowest.reason)


from q3mega.rewards import (  # noqa: E402  (they register)
    answer,  # noqa: F401
    code,  # noqa: F401
    constraint_counts,  # noqa: F401
    constraint_forms,  # noqa: F401
    exact,  # noqa: F401
    found,  # noqa: F401
    language,  # noqa: F401
    length,  # noqa: F401
    length_control,  # noqa: F401
    mode,  # noqa: F401
    premise,  # noqa: F401
    repetition,  # noqa: F401
    tool_call,  # noqa: F401
    tool_calls,  # noqa: F401
)

# family -> (kind of reward, its name or names); the reasoning families are the answer reward's
TASK_REWARD: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "repeat_digit": ("rule", "exact"),
    "json_digit": ("rule", "json"),
    "think_follow": ("rule", ("mode", "answered")),
    "boxed_digit": ("rule", "exact"),
    "describe": ("preference", "preference"),
    "advise": ("preference", "preference"),
    "calculator": ("rule", "answer"),
    "lookup": ("rule", "answer"),
    "rag_answer": ("judge", "judge"),
    "rag_name": ("judge", "judge"),
}
