"""Rewards: one file each, one registry. A reward reads text and a row, and says why it gave what.

    @reward("shouting")
    def shouting(completion, row):
        return Verdict(float(completion.isupper()), "all upper case?")

`row` holds a problem's fields (family, answer, messages, meta, ...). The rewards `judge` and
`preference` read what the models of general RL have said: row["scored"].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from q3mega.data.tasks import Problem
from q3mega.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """score in [0, 1], and the reason in a few words. Any other score, NaN too, is an error.

    parts: each reward's own score, where several make one.
    """

    score: float
    reason: str
    parts: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"score={self.score} ({self.reason}): a reward must give 0..1")


Reward = Callable[[str, Mapping[str, Any]], Verdict]
# One registered reward; several, whose product counts; or several with weights.
Names = str | Sequence[str] | Mapping[str, float]
_REWARDS: dict[str, Reward] = {}


def reward(name: str) -> Callable[[Reward], Reward]:
    """Decorator: register `f(completion, row) -> Verdict` under `name`.

    completion: the assistant's raw text, think tags and tool calls included, stop token not.
    """

    def register(fn: Reward) -> Reward:
        _REWARDS[name] = fn
        return fn

    return register


def listed(names: Names) -> list[str]:
    """The rewards that make one."""
    return [names] if isinstance(names, str) else list(names)


def score(names: Names, completion: str, row: Mapping[str, Any]) -> Verdict:
    """The verdict of one registered reward; of several the product, or with weights their mean.

    The reason is the lowest one's. Raises UserError for an unknown name or a weight of no use.
    """
    weights = names if isinstance(names, Mapping) else None
    for name in listed(names):
        if name not in _REWARDS:
            raise UserError(f"reward={name!r} is unknown: use one of {', '.join(sorted(_REWARDS))}")
    verdicts = {name: _REWARDS[name](completion, row) for name in listed(names)}
    if weights is None:
        value = math.prod(v.score for v in verdicts.values())
    else:
        if not all(isinstance(w, int | float) and 0 < w < math.inf for w in weights.values()):
            raise UserError(f"reward={dict(weights)}: weights must be numbers above 0")
        value = sum(weights[n] * v.score for n, v in verdicts.items()) / sum(weights.values())
    lowest = min(verdicts.values(), key=lambda v: v.score)
    parts = {name: verdict.score for name, verdict in verdicts.items()}
    return Verdict(min(value, 1.0), lowest.reason, parts)


from q3mega.rewards import (  # noqa: E402  (they register)
    answer,  # noqa: F401
    code,  # noqa: F401
    constraint_counts,  # noqa: F401
    constraint_forms,  # noqa: F401
    exact,  # noqa: F401
    found,  # noqa: F401
    grounded,  # noqa: F401
    judge,  # noqa: F401
    language,  # noqa: F401
    length,  # noqa: F401
    length_control,  # noqa: F401
    mode,  # noqa: F401
    preference,  # noqa: F401
    premise,  # noqa: F401
    repetition,  # noqa: F401
    tool_call,  # noqa: F401
    tool_calls,  # noqa: F401
)

MODELS = ("judge", "preference")  # what needs a model, which general RL has
# family -> its reward; the reasoning families' is `answer`
TASK_REWARD: dict[str, Names] = {
    "repeat_digit": "exact",
    "json_digit": "json",
    "bounded": "constraints_strict",
    "program": "code",
    "think_follow": ("mode", "answered"),
    "boxed_digit": "exact",
    "describe": "preference",
    "advise": "preference",
    "calculator": "answer",
    "lookup": "answer",
    "rag_answer": "judge",
    "rag_name": "judge",
}


def reward_of(problem: Problem) -> Names:
    """What judges a problem: the reward that its file names, else its task's."""
    return problem.meta.get("reward") or TASK_REWARD.get(problem.family, "answer")


def models_of(problem: Problem) -> list[str]:
    """Which of MODELS a problem's reward asks."""
    return [m for m in MODELS if m in listed(reward_of(problem))]


def judge_answer(problem: Problem, text: str, **facts: Any) -> Verdict:
    """The verdict of a problem's reward on a completion.

    facts: what a reward reads besides the problem: tokens and max_tokens of the completion, and
    scored, the verdicts of MODELS on it.
    Raises UserError for a problem that lacks what its reward reads.
    """
    try:
        return score(reward_of(problem), text, problem.row | facts)
    except KeyError as error:
        raise UserError(
            f"reward={reward_of(problem)} of {problem.question[:60]!r} needs the field {error}"
        ) from error
