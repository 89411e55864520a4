"""Scripts by Unicode, languages by py3langid: a classifier of 139, whose model is in its wheel."""

import functools
import re
import unicodedata
from collections import Counter
from itertools import groupby

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# The first thousand characters tell the language as well as all do, and cost less.
READ = 1000


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability in [0, 1]) of a text's language, by its first 1,000 characters.

    A text without letters has a low probability; short ones (a few words) are often wrong.
    """
    code, probability = _identifier().classify(text[:READ])
    return code, float(probability)


@functools.lru_cache(maxsize=10_000)
def script(letter: str) -> str:
    """The Unicode script by name: "LATIN", "CYRILLIC"; Han and kana are one, for Japanese."""
    name = re.split(r"[ -]", unicodedata.name(letter, "UNKNOWN"), maxsplit=1)[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC") else name


def scripts(text: str) -> Counter[str]:
    """Words by script: a run of letters is one, and so is each letter of Chinese and Japanese."""
    found: Counter[str] = Counter()
    for name, run in groupby(text, lambda c: script(c) if c.isalpha() else ""):
        found[name] += sum(1 for _ in run) if name == "CJK" else 1
    del found[""]
    return found
