"""Language consistency: the share of letters in the scripts of the question.

DeepSeek-R1 (2501.12948) rewards the share of words in the target language to stop thinking from
mixing languages. Scripts are a coarse form of it that short texts cannot fool: Chinese in an
English answer shows, French does not.
"""

import unicodedata
from collections.abc import Mapping
from typing import Any

from q3mega.rewards import Verdict, reward


def script(letter: str) -> str:
    """The Unicode script by name: "LATIN", "CYRILLIC"; Han and kana are one, for Japanese."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name


@reward("language")
def language(completion: str, row: Mapping[str, Any]) -> Verdict:
    """Share of the completion's letters whose script occurs in the last message; 1 without any."""
    asked = {script(c) for c in row["messages"][-1]["content"] if c.isalpha()}
    letters = [script(c) for c in completion if c.isalpha()]
    if not letters or not asked:
        return Verdict(1.0, "no letters to compare")
    share = sum(s in asked for s in letters) / len(letters)
    return Verdict(share, f"{share:.2f} of the letters are in the question's scripts")
