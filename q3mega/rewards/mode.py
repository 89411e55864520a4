"""Format following: think tags well formed, and the mode that the last flag asks for.

Every reward of a reply goes through `reply`, so that none pays for malformed tags.
"""

from collections.abc import Mapping
from typing import Any

from q3mega.data.chat import last_flag, parse
from q3mega.errors import UserError
from q3mega.rewards.registry import Verdict, reward


def mode_of(completion: str) -> str | None:
    """ "think", "no_think" (an empty block), or None when the block is missing or malformed."""
    message = parse(completion)
    one_block = completion.count("<think>") == completion.count("</think>") == 1
    if not (one_block and message.closed and completion.startswith("<think>")):
        return None
    return "think" if (message.thinking or "").strip() else "no_think"


def reply(completion: str) -> str | None:
    """What follows the thinking, if there is any; None where the think tags are malformed."""
    if "<think>" in completion or "</think>" in completion:
        return parse(completion).content.strip() if mode_of(completion) else None
    return parse(completion).content.strip()


def _named_mode(row: Mapping[str, Any]) -> str | None:
    return row.get("mode") or row.get("meta", {}).get("mode")


def _check_row(row: Mapping[str, Any]) -> None:
    if (named_mode := _named_mode(row)) not in (None, "think", "no_think"):
        raise UserError(f"mode={named_mode!r:.80} must be think or no_think")


@reward("mode", needs=_check_row)
def mode(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 when the completion is in the wanted mode and says something after its thinking.

    The wanted mode is row["mode"] or row["meta"]["mode"], else the last flag of the
    conversation, else thinking.
    """
    expected_mode = _named_mode(row) or last_flag(row["messages"]) or "think"
    given_mode = mode_of(completion)
    if given_mode is None:
        return Verdict(0.0, "think block missing or malformed")
    if not reply(completion):
        return Verdict(0.0, "nothing after the thinking")
    return Verdict(
        float(given_mode == expected_mode), f"{given_mode} where {expected_mode} was asked"
    )
