"""Questions with a false premise: whether a reply says so, names what is true, or just answers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from q3mega.errors import UserError
from q3mega.rewards.instructions.text_units import fold, occurrences, sentences, visible, words
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reward
from q3mega.rewards.string_match import texts

MAX_WORDS = 60  # of a reply that was asked for in one sentence: a longer one may say everything
REFUSED = 0.5  # for a refusal that does not say what is true
_WRONG = r"(?:false|wrong|incorrect|mistaken|untrue|not (?:true|correct|right|so))"
# A denial that is itself denied ("not a false premise") is none.
_DENIAL = re.compile(
    rf"(?<!no )(?<!not a )(?<!n't a ){_WRONG} (?:premise|assumption)"
    r"|(?:premise|assumption|question)(?: of the question)? (?:is|was|seems) "
    rf"(?:(?!not )\w+ )?{_WRONG}"
    r"|(?:can ?not|can't) be (?:answered|determined|known|told)|can(?:not|'t) (?:answer|tell|know)"
    r"|(?:not|n't|never) (?:be )?(?:stated?|mention(?:s|ed)?|says?|said|given|known)"
    r"|(?:not|n't) (?:be )?specif(?:y|ied)|no (?:information|mention|way to (?:know|tell))"
)


def _check_row(row: Mapping[str, Any]) -> None:
    if (kind := row.get("premise")) not in ("true", "false", "unknown"):
        raise UserError(f"premise={kind!r:.80} must be true, false or unknown")
    accepted, _ = texts(row, "accepted"), texts(row, "rivals")
    if kind == "true" and not accepted:
        raise UserError("accepted=[] leaves no answer that is right: give them")


@reward("false_premise", needs=_check_row)
def false_premise(completion: str, row: Mapping[str, Any]) -> Verdict:
    """Whether a reply answers a question that is in order, and refuses one that is not.

    row["premise"]: "true", 1 for one of row["accepted"] without a refusal; "false", 1 for a refusal
    that names one of row["accepted"], what is true instead, 0.5 for a bare one; "unknown", 1 for a
    refusal. Naming any of row["rivals"], other answers to what is asked, or more than 60 words,
    earns 0.
    """
    accepted, rivals = row["accepted"], row["rivals"]
    text = reply(completion)
    if text is None:
        return Verdict(0.0, "think block malformed or never closed")
    text = _without_refusal_hints(visible(text), row["messages"][-1]["content"])
    if not 0 < len(words(text)) <= MAX_WORDS:
        return Verdict(0.0, f"{len(words(text))} words, 1 to {MAX_WORDS} make sense")
    guesses = [r for r in rivals if occurrences(text, r)]
    if guesses:
        return Verdict(0.0, f"names {guesses[0]} as well")
    refused = bool(_DENIAL.search(text))
    right = _named(text, accepted)
    if row["premise"] == "true":
        return Verdict(float(right and not refused), "refused" if refused else "answered")
    if not refused:
        return Verdict(0.0, "answered as if nothing were wrong")
    if row["premise"] == "unknown" or right:
        return Verdict(1.0, "refused for the right reason")
    return Verdict(REFUSED, "refused without saying what is true")


def _without_refusal_hints(text: str, question: str) -> str:
    """The folded reply without the question's sentences on how to refuse, if it copies them."""
    text = fold(text).replace("’", "'")
    for sentence in map(fold, sentences(question)):
        if _DENIAL.search(sentence):
            text = text.replace(sentence, " ")
    return text


def _named(text: str, phrases: Sequence[str]) -> bool:
    return any(occurrences(text, phrase) for phrase in phrases)
