"""Rewards: one file each, one registry. A reward reads text and a row, and says why it gave what.

    @reward("shouting")
    def shouting(completion, row):
        return Verdict(float(completion.isupper()), "all upper case?")

`row` holds a problem's fields (family, answer, messages, meta, ...). Model-based rewards (judge,
preference) need a model and are called with one from the stage that holds it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from q3mega.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """score in [0, 1], and the reason in a few words."""

    score: float
    reason: str


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


def score(name: str, completion: str, row: Mapping[str, Any]) -> Verdict:
    """The verdict of one registered reward."""
    if name not in _REWARDS:
        raise UserError(f"reward={name!r} is unknown: use one of {', '.join(sorted(_REWARDS))}")
    return _REWARDS[name](completion, row)


from q3mega.rewards import answer, exact, mode, tool_call  # noqa: E402, F401  (they register)

# family -> (kind of reward, its name); the reasoning families are the answer reward's
TASK_REWARD = {
    "repeat_word": ("rule", "exact"),
    "json_word": ("rule", "json"),
    "end_with": ("rule", "exact"),
    "think_follow": ("rule", "mode"),
    "boxed_word": ("rule", "exact"),
    "describe": ("preference", "preference"),
    "advise": ("preference", "preference"),
    "calculator": ("rule", "answer"),
    "lookup": ("rule", "answer"),
    "rag_answer": ("judge", "judge"),
    "rag_name": ("judge", "judge"),
}
