"""Words, sentences, paragraphs and lists of a text in many languages, counted in linear time.

Every search here advances: no pattern can backtrack, whatever text a model writes. Two known
limits: Thai, Lao, Khmer and Burmese have no spaces between words, and four letters of them count as
a word; Thai has no full stop, and a paragraph of it is one sentence.
"""

import re
import unicodedata

from q3mega.data.language import IDEOGRAPHS, SPACELESS, marks, script, scripts
from q3mega.data.package_text import clean

_JOINERS = "\u200c\u200d"
_OPENING, _CLOSING = "\"'“‘„‚«‹(「『【[*_", "\"'”’“‘»›)」』】]*_"
_WIDE_STOPS = "。！？｡．။။៕។།"  # end a sentence without a space behind them
_STOPS = re.compile(rf"[.!?…‼⁇⁈⁉؟।॥۔።፧։;{_WIDE_STOPS}]++[{re.escape(_CLOSING)}]*+")
_QUESTION_MARKS = frozenset("?？؟፧⁇⁈⁉՞")
# Before a full stop these are abbreviations: the first never end a sentence, the second end one
# where a capital letter follows.
_TITLES = frozenset([
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "fig", "no", "nr", "vol", "pp",
    "approx", "e.g", "i.e", "cf", "z.b", "d.h", "bzw", "ca", "p.ex", "ej", "p.ej", "sra", "г",
    "ул", "т.е",
])  # fmt: skip
_TAILS = frozenset([
    "etc", "usw", "u.a", "inc", "ltd", "co", "corp", "a.m", "p.m", "al", "т.д", "т.п",
])  # fmt: skip
# Scripts whose words carry what other languages write apart: particles behind them in Korean, the
# article before them in Arabic and Hebrew; and the scripts without spaces.
_OPEN_BEFORE = frozenset(["ARABIC", "HEBREW", "CJK", "THAI", "LAO", "KHMER", "MYANMAR"])
_OPEN_AFTER = _OPEN_BEFORE | {"HANGUL"}
_ITEM = re.compile(
    r"(?:([-*+•‣◦·–](?=\s)|[・●○■□◆◇▪▶►])"  # bullets; then numbers: 1. 1) １、 （1） ①
    r"|\d{1,9}(?:[.)](?=\s)|[．、）](?!\d))|[(（]\d{1,9}[)）]|[①-⑳])\s*(?=\S)"
)


def visible(text: str) -> str:
    """The text as a reader sees it: NFC, no control, direction or zero-width characters, no blanks
    at a line's end, at most one empty line in a row."""
    return clean("\n".join(line.rstrip() for line in text.splitlines()))


_LETTER = rf"[^\W_{IDEOGRAPHS}{SPACELESS}]"
_RUN = rf"{_LETTER}[{marks()}{_JOINERS}]*+"
_WORD = re.compile(
    rf"[{IDEOGRAPHS}]|(?:(?=[{SPACELESS}])\w[{marks()}]*+){{1,4}}+"
    rf"|{_RUN}(?:{_RUN}|['’](?={_LETTER})|(?<=\d)[.,٫٬](?=\d))*+"
)


def words(text: str) -> list[str]:
    """In order, as written. Apostrophes and decimal points join ("don't", 3.5), hyphens do not."""
    return _WORD.findall(text)


def fold(text: str) -> str:
    """NFC without case, blanks made single and joiners dropped, to look for words in."""
    text = unicodedata.normalize("NFC", text)
    return " ".join(text.translate(dict.fromkeys(map(ord, _JOINERS))).casefold().split())


def occurrences(text: str, phrase: str) -> int:
    """How often a word or phrase stands in the text, whatever its case and as a word of its own.

    In scripts that join their words (see above) it may be part of a longer run of letters.
    """
    text, phrase = fold(text), fold(phrase)
    assert phrase, "a blank phrase is everywhere"
    count, start = 0, text.find(phrase)
    while start >= 0:
        end = start + len(phrase)
        alone = _border(text[start - 1 : start], phrase[0], _OPEN_BEFORE)
        if alone and _border(text[end : end + 1], phrase[-1], _OPEN_AFTER):
            count, start = count + 1, text.find(phrase, end)
        else:
            start = text.find(phrase, start + 1)
    return count


def _border(beyond: str, edge: str, open_scripts: frozenset[str]) -> bool:
    """Whether a phrase may end here: `beyond` is the character past its first or last one."""
    if not beyond or not edge.isalnum() or script(edge) in open_scripts:
        return True
    return not (beyond.isalnum() or unicodedata.category(beyond)[0] == "M")


def prose(text: str) -> str:
    """The text without its fenced code blocks; all of it where there is nothing else."""
    kept = "\n".join(line for language, body in _fenced(text) if language is None for line in body)
    return kept if kept.strip() else text


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language in lower case or "", code) of every fenced block that is closed and not blank."""
    blocks = [
        (language, "\n".join(body)) for language, body in _fenced(text) if language is not None
    ]
    return [(language, code) for language, code in blocks if code.strip()]


def _fenced(text: str) -> list[tuple[str | None, list[str]]]:
    """Lines outside of fences under None, those of each closed fence under its language."""
    parts: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in text.split("\n"):
        bare = line.strip()
        language = parts[-1][0]
        if language is None and bare.startswith("```") and "`" not in bare[3:]:
            parts.append(((bare[3:].split() or [""])[0].lower(), []))
        elif language is not None and bare == "```":
            parts.append((None, []))
        else:
            parts[-1][1].append(line)
    if parts[-1][0] is not None:  # never closed: no code
        parts[-1] = (None, parts[-1][1])
    return parts


def lines(text: str) -> list[str]:
    """Those that are not blank, without the blanks around them."""
    return [bare for line in text.split("\n") if (bare := line.strip())]


def paragraphs(text: str) -> list[str]:
    """What blank lines part."""
    return [part for part in text.split("\n\n") if part.strip()]


def items(text: str, numbered: bool) -> list[str]:
    """Contents of bulleted or numbered lines outside of code, if they say anything."""
    marked = [(m, line[m.end() :]) for line in lines(prose(text)) if (m := _ITEM.match(line))]
    return [content for m, content in marked if (m[1] is None) == numbered and words(content)]


def sentences(text: str) -> list[str]:
    """A sentence ends with a full stop of any script, and with the paragraph, heading or item that
    it stands in. Abbreviations, decimals, an initial and the number of an item end none."""
    pieces = []
    for block in _blocks(prose(text)):
        start = 0
        for m in _STOPS.finditer(block):
            if _ends(block, m):
                pieces.append(block[start : m.end()].strip())
                start = m.end()
        pieces.append(block[start:].strip())
    return [sentence for sentence in pieces if words(sentence)]


def is_question(sentence: str) -> bool:
    """Whether it ends in a question mark; Armenian has it within the last word, Greek writes ;."""
    if _QUESTION_MARKS.intersection(sentence[-4:]) or "՞" in sentence:
        return True
    commonest_script = [name for name, _ in scripts(sentence[-100:]).most_common(1)]
    return ";" in sentence[-4:] and commonest_script == ["GREEK"]


def _blocks(text: str) -> list[str]:
    """Paragraphs, with headings and items of lists as blocks of their own, markers taken off."""
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        bare = line.strip()
        marker = _ITEM.match(bare)
        if not bare or marker or bare.startswith("#"):
            blocks.append([])
        blocks[-1].append(bare[marker.end() :] if marker else bare.lstrip("# "))
        if bare.startswith("#"):
            blocks.append([])
    return [" ".join(block) for block in blocks]


def _ends(block: str, stop: re.Match[str]) -> bool:
    """Whether the punctuation that was found ends a sentence."""
    after = block[stop.end() : stop.end() + 2]
    if any(c in _WIDE_STOPS for c in stop[0]):
        return True
    if after and not after[0].isspace():
        return False
    mark = stop[0].rstrip(_CLOSING)
    following = after[1:].lstrip(_OPENING)
    if mark in ("...", "…"):
        return not following.islower()
    if ";" in mark:  # the question mark of Greek alone
        return is_question(block[: stop.end()])
    if mark != ".":
        return True
    before = block[max(0, stop.start() - 20) : stop.start()].split()
    word = before[-1].lstrip(_OPENING) if before else ""
    if word.lower() in _TAILS:
        return not following or following.isupper()
    initial = len(word) == 1 and word.isupper() and word != "I" and following.isupper()
    return word.lower() not in _TITLES and not initial
