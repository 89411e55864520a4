"""Rewards: one file each, one registry. A reward reads a text and a row, and gives a reason.

    @reward("shouting")
    def shouting(completion, row):
        return Verdict(float(completion.isupper()), "all upper case?")

A bare number will do for a verdict, and None where the reward cannot judge. `row` holds a problem's
fields (family, answer, messages, meta, ...). The rewards `judge` and `preference` read the verdicts
of general RL's models from row["scored"].
"""

from importlib import import_module
from typing import Any

from q3mega.problems import Problem
from q3mega.rewards.registry import (
    Needs,
    Reward,
    RewardSpec,
    Verdict,
    reference,
    reward,
    reward_names,
    score,
)

__all__ = [
    "MODELS",
    "TASK_REWARD",
    "Needs",
    "Reward",
    "RewardSpec",
    "Verdict",
    "model_rewards_of",
    "reference",
    "reward",
    "reward_names",
    "reward_of",
    "score",
    "score_problem",
]
_BUILT_IN = (  # the modules that register a reward, or a kind of constraint
    "false_premise",
    "groundedness",
    "instructions.constraint_counts",
    "instructions.constraint_forms",
    "instructions.exact_match",
    "instructions.length_control",
    "language",
    "math.answer",
    "mode",
    "models.judge",
    "models.preference",
    "overlong",
    "programs.code",
    "repetition",
    "string_match",
    "tool_calls",
)
for _module in _BUILT_IN:
    import_module(f"{__name__}.{_module}")

MODELS = ("judge", "preference")  # what needs a model, which general RL has
# family -> its reward; the reasoning families' is `answer`
TASK_REWARD: dict[str, RewardSpec] = {
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


def reward_of(problem: Problem) -> RewardSpec:
    """What judges a problem: the reward that its file names, else its task's."""
    return problem.meta.get("reward") or TASK_REWARD.get(problem.family, "answer")


def model_rewards_of(problem: Problem) -> list[str]:
    """Which of MODELS a problem's reward asks."""
    return [m for m in MODELS if m in reward_names(reward_of(problem))]


def score_problem(problem: Problem, text: str, **facts: Any) -> Verdict:
    """The verdict of a problem's reward on a completion.

    facts: what a reward reads besides the problem: tokens and max_tokens of the completion, and
    scored, the verdicts of MODELS on it.
    Raises UserError for a problem that lacks what its reward reads.
    """
    return score(reward_of(problem), text, problem.row | facts)
