"""The registry of rewards: a verdict, its decorator, and the score of one reward or several."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, prod
from numbers import Real
from typing import Any, TypeVar

from q3mega.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """What a reward gives.

    score: a finite number, 1 for full marks; None where the reward cannot judge. Scalars of numpy
        and torch become the numbers they hold. Anything else raises a ValueError.
    reason: a few words.
    parts: the score of each reward by its name, where several make one.
    """

    score: float | None
    reason: str
    parts: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.score is not None:
            object.__setattr__(self, "score", _finite(self.score))


def _finite(value: Any) -> float:
    scalar = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(scalar, Real) and isfinite(number := float(scalar)):
        return number
    raise ValueError(f"score={value!r:.80} must be a finite number, or None")


Reward = Callable[[str, Mapping[str, Any]], Verdict | float | None]
_Reward = TypeVar("_Reward", bound=Reward)
Needs = Callable[[Mapping[str, Any]], object]
# One registered reward; several, whose product counts; or several with weights.
RewardSpec = str | Sequence[str] | Mapping[str, float]
_REWARDS: dict[str, tuple[Reward, Needs | None]] = {}
RENAMED = {"found": "string_match", "grounded": "groundedness", "premise": "false_premise"}


def reward(name: str, needs: Needs | None = None) -> Callable[[_Reward], _Reward]:
    """Decorator: register `f(completion, row) -> Verdict | float | None` under `name`.

    completion: the assistant's raw text with think tags and tool calls, without the stop token.
    needs(row): raises ValueError for a row that the reward cannot judge by. Such a row is refused
        before a stage computes. A pydantic model's `model_validate` will do.
    """

    def register(fn: _Reward) -> _Reward:
        _REWARDS[name] = fn, needs
        return fn

    return register


def reward_names(names: RewardSpec) -> list[str]:
    """The names in a specification, in its order."""
    return [names] if isinstance(names, str) else list(names)


def score(names: RewardSpec, completion: str, row: Mapping[str, Any]) -> Verdict:
    """The verdict of one registered reward; of several their product, or with weights their mean.

    The reason is that of the lowest score. Where one reward cannot judge, the score is None. A
    product with a negative factor is its lowest factor, so that two penalties make no reward.
    Raises UserError for an unknown name, a weight that is no number above 0, and a reward that
    breaks.
    """
    weights = names if isinstance(names, Mapping) else None
    for name in reward_names(names):
        if name not in _REWARDS:
            if name in RENAMED:
                raise UserError(f"reward={name!r} is called {RENAMED[name]} now")
            raise UserError(f"reward={name!r} is unknown: use one of {', '.join(sorted(_REWARDS))}")
    if weights and not all(isinstance(w, int | float) and 0 < w < inf for w in weights.values()):
        raise UserError(f"reward={dict(weights)}: weights must be numbers above 0")
    verdicts = {name: _verdict(name, completion, row) for name in reward_names(names)}
    parts = {name: v.score for name, v in verdicts.items() if v.score is not None}
    for verdict in verdicts.values():
        if verdict.score is None:
            return Verdict(None, verdict.reason, parts)
    lowest = min(parts, key=parts.__getitem__)
    if weights:
        mean = sum(weights[name] * part for name, part in parts.items()) / sum(weights.values())
        value = min(max(mean, parts[lowest]), max(parts.values()))  # rounding
    else:
        value = parts[lowest] if parts[lowest] < 0 else prod(parts.values())
    return Verdict(value, verdicts[lowest].reason, parts)


def _verdict(name: str, completion: str, row: Mapping[str, Any]) -> Verdict:
    """What one reward gives, as a verdict. Raises UserError that names it and the row."""
    fn, needs = _REWARDS[name]
    try:
        if needs:
            needs(row)
        result = fn(completion, row)
        if isinstance(result, Verdict):
            return result
        return Verdict(result, f"{name} cannot judge it" if result is None else f"of {name}")
    except UserError as error:
        raise UserError(f"reward={name} of {_row_name(row)}: {error}") from error
    except Exception as error:
        if isinstance(error, KeyError) and error.args and error.args[0] not in row:
            problem = f"needs the field {error}"
        else:
            problem = f"failed with {type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"reward={name} of {_row_name(row)} {problem}") from error


def _row_name(row: Mapping[str, Any]) -> str:
    """How an error names a row: its line in a file, and how its question begins."""
    question = repr(row["messages"][-1]["content"][:60]) if row.get("messages") else "a row"
    return f"{question} ({row['where']})" if "where" in row else question


def reference(row: Mapping[str, Any]) -> str:
    """The row's reference answer. Raises UserError for a row without one."""
    text = row.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"answer={text!r:.80} must be the reference, a text or a number: add it")
    return text
