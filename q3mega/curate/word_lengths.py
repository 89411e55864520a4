"""How long words are, by language: what scales rules that were made for English.

Letters a word, the mean over the sentences that Django's translation files (BSD-3) have in the
language, of four English words and more each. `python -m q3mega.curate.word_lengths` measures
them again.
"""

import itertools
import unicodedata

from q3mega.data import package_text

ENGLISH = 5.1
# ISO 639-1 -> letters, of languages that part their words by spaces
WORD_LENGTHS = {
    "af": 5.3, "ar": 5.0, "az": 6.4, "be": 6.3, "bg": 5.7, "bn": 5.4, "ca": 5.3, "cs": 6.0,
    "cy": 5.2, "da": 5.8, "de": 6.6, "el": 5.9, "en": 5.1, "eo": 5.6, "es": 5.5, "et": 6.7,
    "eu": 6.6, "fa": 4.5, "fi": 7.6, "fr": 5.3, "ga": 5.2, "gd": 5.5, "gl": 5.3, "he": 4.8,
    "hi": 4.4, "hr": 6.0, "hu": 6.2, "hy": 6.2, "id": 6.2, "is": 5.4, "it": 5.7, "ka": 7.0,
    "kk": 6.8, "ko": 3.7, "ky": 6.3, "lt": 6.9, "lv": 6.5, "mk": 5.4, "ml": 8.2, "mn": 6.1,
    "mr": 5.6, "ms": 6.3, "ne": 5.5, "nl": 5.8, "nn": 5.6, "no": 5.7, "pl": 6.3, "pt": 5.5,
    "ro": 5.6, "ru": 6.5, "sk": 6.0, "sl": 5.7, "sq": 5.3, "sr": 5.7, "sv": 5.8, "sw": 5.9,
    "tg": 6.1, "tk": 6.6, "tr": 6.7, "ug": 7.0, "uk": 6.2, "uz": 7.2, "vi": 3.5,
}  # fmt: skip
_CODES = {"no": "nb"}  # ours -> Django's
_FEWEST = 60  # sentences


def bounds(language: str, low: float, high: float) -> tuple[float, float]:
    """English bounds on the mean word for a language: only ever wider, by how its words differ.

    A language that the table lacks gets the widest of all.
    """
    lengths = (WORD_LENGTHS[language],) if language in WORD_LENGTHS else WORD_LENGTHS.values()
    shortest, longest = min(ENGLISH, *lengths), max(ENGLISH, *lengths)
    return low * shortest / ENGLISH, high * longest / ENGLISH


def measure(language: str) -> float | None:
    """Letters a word in Django's translations; None where there are too few of them."""
    pairs = itertools.chain.from_iterable(package_text.translations(_CODES.get(language, language)))
    lines = [there for here, there in pairs if here != there and len(here.split()) > 3]
    words = [w for line in lines for w in unicodedata.normalize("NFC", line).split()]
    lengths = [len(w) for w in words if any(map(str.isalpha, w))]
    return sum(lengths) / len(lengths) if len(lines) >= _FEWEST else None


if __name__ == "__main__":
    for code in WORD_LENGTHS:
        print(code, WORD_LENGTHS[code], measure(code))
