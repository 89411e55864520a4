"""Instruction checks: the reply is what was asked for, to the letter, or as JSON to the value."""

import json
from collections.abc import Mapping
from typing import Any

from q3mega.errors import UserError
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reference, reward


@reward("exact", needs=reference)
def exact(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 when the reply after the thinking is exactly the reference."""
    right = reply(completion) == row["answer"]
    return Verdict(float(right), "as asked" if right else "not as asked")


def _json_reference(row: Mapping[str, Any]) -> None:
    try:
        json.loads(reference(row))
    except (ValueError, RecursionError) as error:
        raise UserError(f"answer={row.get('answer')!r:.80} must be JSON, as a text") from error


@reward("json", needs=_json_reference)
def json_object(completion: str, row: Mapping[str, Any]) -> Verdict:
    """1 when the reply after the thinking is JSON of the reference's value, in any layout."""
    text = reply(completion)
    try:
        # Pairs, not a dict: of a key given twice a dict would forget the first value.
        given = json.loads(text or "", object_pairs_hook=list)
    except (ValueError, RecursionError):  # ValueError is also what an integer too long raises
        return Verdict(0.0, "not JSON")
    right = given == json.loads(row["answer"], object_pairs_hook=list)
    return Verdict(float(right), "as asked" if right else "JSON of something else")
