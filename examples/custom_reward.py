"""A reward of one's own: `rewards: [custom_reward.py]` in a recipe, or `q3mega eval --rewards`.

Rows name it: {"question": ..., "documents": [...], "reward": {"groundedness": 0.8, "cites": 0.2}}.
"""

import re
from collections.abc import Mapping
from typing import Any

from q3mega.rewards import Verdict, reward
from q3mega.rewards.mode import reply


def has_documents(row: Mapping[str, Any]) -> None:
    """A row without documents is refused before anything computes."""
    if not isinstance(row.get("documents"), list) or not row["documents"]:
        raise ValueError(f"documents={row.get('documents')!r:.80} must be a list of texts")


@reward("cites", needs=has_documents)
def cites(completion: str, row: Mapping[str, Any]) -> Verdict:
    """Share of the citations, such as [2], that name one of row["documents"]; 0 without any."""
    cited = re.findall(r"\[(\d{1,6})\]", reply(completion) or "")
    good = [n for n in cited if 1 <= int(n) <= len(row["documents"])]
    if not cited:
        return Verdict(0.0, "no citation")
    return Verdict(len(good) / len(cited), f"{len(good)} of {len(cited)} citations exist")
