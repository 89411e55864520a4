"""Scripts by Unicode, languages by py3langid: a classifier of 139, whose model is in its wheel."""

import functools
import re
import sys
import unicodedata
from collections import Counter
from itertools import groupby

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# The first thousand characters tell the language as well as all do, and cost less.
READ = 1000

# Ranges for a regex's brackets. Han and kana are written without spaces: each is a word.
IDEOGRAPHS = r"\u3005\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Thai and Lao, Burmese, Khmer: words of several letters without spaces between them.
SPACELESS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# Letterlike symbols, mathematical alphanumerics (Latin, Greek, Arabic), the micro sign: of no
# language.
_MATHEMATICAL = re.compile(r"[\u00b5\u2100-\u214f\U0001d400-\U0001d7ff\U0001ee00-\U0001eeff]")
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"  # code
    r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]"  # formulas
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\boxed\s*\{[^{}]*\}|\\[A-Za-z]+"
    r"|https?://[^\s\u3000-\uffef]+"
    r"|(?<![A-Za-zͰ-Ͽ])(?:[Ͱ-Ͽ]?[A-Za-zͰ-Ͽ]|sin|cos|tan|cot|log|ln|exp|lim|max|min|mod|gcd|lcm)"
    r"(?![A-Za-zͰ-Ͽ])"  # variables, functions
    r"|(?<=[\d$)]) ?[A-Za-z]{1,3}(?![A-Za-z])",  # units
    re.DOTALL,
)


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
    """The Unicode script by name: "LATIN", "CYRILLIC"; Han, kana and bopomofo are one, "CJK".

    Full-width and half-width letters are of the script that they stand for; "" for the letters of
    mathematics, such as ℝ and 𝑥.
    """
    if _MATHEMATICAL.match(letter):
        return ""
    plain = unicodedata.normalize("NFKC", letter).strip()[:1]
    name = re.split(r"[ -]", unicodedata.name(plain or letter, "UNKNOWN"), maxsplit=1)[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "BOPOMOFO") else name


def scripts(text: str) -> Counter[str]:
    """Words by script: a run of letters is one, and so is each letter of Chinese and Japanese."""
    counts: Counter[str] = Counter()
    letters = re.sub(rf"[{marks()}]", "", text)
    for name, run in groupby(letters, lambda c: script(c) if c.isalpha() else ""):
        counts[name] += sum(1 for _ in run) if name == "CJK" else 1
    del counts[""]
    return counts


def prose(text: str) -> str:
    """The text without what every language writes alike: code, formulas, variables, units, URLs."""
    return _NO_PROSE.sub(" ", text)


@functools.cache
def marks() -> str:
    """The vowel signs and accents that belong to the letter before them, as ranges of a regex."""
    points = (n for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n))[0] == "M")
    runs = (list(run) for _, run in groupby(enumerate(points), lambda pair: pair[1] - pair[0]))
    return "".join(f"\\U{run[0][1]:08x}-\\U{run[-1][1]:08x}" for run in runs)
