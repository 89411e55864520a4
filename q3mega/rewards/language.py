"""Languages and scripts: of a reply against its question, and whether a text is in a language.

DeepSeek-R1 (2501.12948) rewards the share of words in the target language to stop thinking from
mixing languages. Scripts are a coarse form of it that short texts cannot fool: Chinese in an
English answer shows, French does not.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from q3mega.data.language import READ, identify, prose, script, scripts
from q3mega.rewards.registry import Verdict, reward

# code -> its name, its script
_LANGUAGES = {
    "ar": ("Arabic", "ARABIC"), "bg": ("Bulgarian", "CYRILLIC"), "bn": ("Bengali", "BENGALI"),
    "ca": ("Catalan", "LATIN"), "cs": ("Czech", "LATIN"), "da": ("Danish", "LATIN"),
    "de": ("German", "LATIN"), "el": ("Greek", "GREEK"), "en": ("English", "LATIN"),
    "es": ("Spanish", "LATIN"), "et": ("Estonian", "LATIN"), "fa": ("Persian", "ARABIC"),
    "fi": ("Finnish", "LATIN"), "fr": ("French", "LATIN"), "he": ("Hebrew", "HEBREW"),
    "hi": ("Hindi", "DEVANAGARI"), "hr": ("Croatian", "LATIN"), "hu": ("Hungarian", "LATIN"),
    "id": ("Indonesian", "LATIN"), "it": ("Italian", "LATIN"), "ja": ("Japanese", "CJK"),
    "ka": ("Georgian", "GEORGIAN"), "ko": ("Korean", "HANGUL"), "lt": ("Lithuanian", "LATIN"),
    "mr": ("Marathi", "DEVANAGARI"), "nl": ("Dutch", "LATIN"), "no": ("Norwegian", "LATIN"),
    "pl": ("Polish", "LATIN"), "pt": ("Portuguese", "LATIN"), "ro": ("Romanian", "LATIN"),
    "ru": ("Russian", "CYRILLIC"), "sv": ("Swedish", "LATIN"), "sw": ("Swahili", "LATIN"),
    "ta": ("Tamil", "TAMIL"), "te": ("Telugu", "TELUGU"), "th": ("Thai", "THAI"),
    "tr": ("Turkish", "LATIN"), "uk": ("Ukrainian", "CYRILLIC"), "ur": ("Urdu", "ARABIC"),
    "vi": ("Vietnamese", "LATIN"), "zh": ("Chinese", "CJK"),
}  # fmt: skip
NAMES = {code: name for code, (name, _) in _LANGUAGES.items()}
SCRIPTS = {
    s: "Chinese and Japanese" if s == "CJK" else s.title()
    for s in sorted({script for _, script in _LANGUAGES.values()})
}
# Codes that the classifier cannot keep apart in a few sentences.
_TWINS = {"no": {"no", "nb", "nn"}, "id": {"id", "ms"}, "hr": {"hr", "bs", "sr"}}
SHARE = 0.7  # of a text in the language: the rest is names, quotations and loan words
MIN_LETTERS = 20  # below them the classifier is wrong more often than one time in five
_KANA = 0.1  # of the letters of Japanese and more; Chinese has none
_LETTERS = re.compile(r"[^\W\d_]")


def written_in(text: str, code: str) -> str | None:
    """None for a text in the language, else what was found.

    A script that one language of the table uses decides alone. Otherwise the classifier reads all
    of the text, a piece at a time, and what is too short to tell is no: a reward must not pay for
    what it could not check.
    """
    expected_script = _LANGUAGES[code][1]
    text = prose(text)
    letters_by_script = scripts(text)
    if not letters_by_script:
        return "no letters"
    if letters_by_script[expected_script] < SHARE * letters_by_script.total():
        commonest = letters_by_script.most_common(1)[0][0]
        return f"mostly {SCRIPTS.get(commonest, commonest.title())} script"
    if expected_script == "CJK":
        kana = sum("\u3040" <= c <= "\u30ff" for c in text) >= _KANA * letters_by_script["CJK"]
        return None if kana == (code == "ja") else "Japanese" if kana else "Chinese"
    if sum(script == expected_script for _, script in _LANGUAGES.values()) == 1:
        return None
    letters = 0
    by_code: Counter[str] = Counter()
    for start in range(0, len(text), READ):
        piece = text[start : start + READ]
        weight = len(_LETTERS.findall(piece))
        letters += weight
        if weight:
            by_code[identify(piece.lower() if piece.isupper() else piece)[0]] += weight
    if letters < MIN_LETTERS:
        return f"too short to tell ({letters} letters)"
    right = sum(by_code[c] for c in _TWINS.get(code, {code}))
    if right >= SHARE * letters:
        return None
    commonest = by_code.most_common(1)[0][0]
    name = NAMES.get(commonest, commonest)
    return f"only {right / letters:.0%} {name}" if commonest == code else f"mostly {name}"


@reward("language")
def language(completion: str, row: Mapping[str, Any]) -> Verdict:
    """Share of the completion's letters whose script occurs in the last message; 1 without any.

    Formulas, variables, units, code and addresses are of no language, in either.
    """
    question_scripts = set(scripts(prose(row["messages"][-1]["content"])))
    letter_scripts = [name for c in prose(completion) if c.isalpha() and (name := script(c))]
    if not letter_scripts or not question_scripts:
        return Verdict(1.0, "no letters to compare")
    share = sum(s in question_scripts for s in letter_scripts) / len(letter_scripts)
    return Verdict(share, f"{share:.2f} of the letters are in the question's scripts")
