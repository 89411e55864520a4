"""Labels on the report's axes, by rules alone: domain, an educational score, a quality band.

The report's annotators are language models; these are counts of words and lines, cheap enough for
a terabyte and as coarse. `label` sets them, `reject` says which rule of `Rules` a document breaks.
The lexicons are English: text in another language is told by its signs and layout only, and what
depends on the length of words is scaled to the language (`word_lengths`).
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

from q3mega.curate.config import Rules
from q3mega.curate.document import Document
from q3mega.curate.word_lengths import ENGLISH, WORD_LENGTHS, bounds

READ = 2000  # characters from the beginning, and from the middle, that tell domain and score
BANDS = (("high", 0.6), ("medium", 0.4), ("low", 0.0))  # of the educational score, at least
UNSPACED = {"zh", "ja", "th", "lo", "km", "my", "dz"}  # no spaces between words
LETTERS_A_WORD = 2  # there
_UNSPACED_SCALE = LETTERS_A_WORD / (ENGLISH + 1)  # characters of a sentence to those in English
_PAIR = re.compile(rf"\w{{{LETTERS_A_WORD}}}")

_CODE_LINE = re.compile(
    r"\s*(?:(?:def|class|import|from|return|if|elif|else|for|while|try|except|with|raise|assert|"
    r"public|private|static|void|function|var|let|const|fn|impl|use|package|using|struct|enum|"
    r"yield|self|print|end|case|switch|break|continue|async|await)\b.*[:;{}()\[\],'\"=]\s*"
    r"|from [\w.]+ import .+|import [\w.]+|#include.*|#!.*|//.*|@\w+.*|</?\w+.*>|"
    r".*[;{}]|[)\]}]+[,;:]?|[\w.\[\]\"']+ (?:[-+*/|&]?=|:=|<-) .+|[\w.]+\(.*\)[,;:]?)\s*"
)
_FORMULA = re.compile(
    r"\\(?:frac|sum|int|sqrt|alpha|beta|theta|pi|infty|begin|mathbb|leq|geq|cdot|lim)\b"
    r"|\$[^$\n]{1,80}\$|[∑∫√≤≥≠∞∈∀∃⇒]|\d\s*[-+*/=×÷^<>]\s*[\d(]|\b[a-z]\s*[=^]\s*[\w(-]"
)
_MATHEMATICS = re.compile(
    r"\b(?:theorem|lemma|corollary|proof|equations?|integrals?|polynomials?|matri(?:x|ces)|"
    r"derivatives?|algebra\w*|integers?|primes?|vectors?|eigen\w+|geometr\w+|triangles?|"
    r"logarithms?|fractions?|coefficients?|probability|variables?|solve|squares?|roots?)\b"
)
_SCIENCE = re.compile(
    r"\b(?:scien\w+|experiment\w*|hypothes[ie]s|theor(?:y|ies)|molecul\w+|atom\w*|electr\w+|energy|"
    r"temperature|species|cells?|protein\w*|genes?|genom\w+|chemi\w+|physic\w+|biolog\w+|quantum|"
    r"particles?|laborator\w+|measurements?|observations?|statistic\w+|distributions?|samples?|"
    r"arrays?|dimension\w*|frequenc\w+|velocity|acceleration|oxygen|carbon|climate|planets?|"
    r"astronom\w+|neurons?|clinical|patients?|disease\w*|functions?|parameters?)\b"
)
_TURN = re.compile(
    r"(?:<\|im_start\|>|(?:user|assistant|human|system|bot|q|a|interviewer|[A-ZÀ-ЯЁ]\w{1,15}"
    r"(?: [A-Z]\w{1,15})?)\s?[::]\s?\S)",
    re.IGNORECASE,
)
_EXPLAINS = re.compile(
    r"\b(?:because|therefore|thus|hence|for example|for instance|such as|means that|is called|"
    r"defined as|in other words|note that|in order to|as a result|consider|suppose|we (?:can|have)|"
    r"if and only if|first|second|finally|however|returns?)\b"
)
_BOILERPLATE = re.compile(
    r"lorem ipsum|cookie policy|enable javascript|terms of (?:use|service)|privacy policy|"
    r"all rights reserved|click here|subscribe (?:now|to our)|sign up|log ?in|add to cart|"
    r"free shipping|buy now|read more|share on (?:facebook|twitter)"
)
_BULLET = re.compile(r"\s*(?:(?:[-*•‣▪◦·]|\d{1,3}[.)])\s|[・●○■□◆▶]|\d{1,3}[、．])")
_SENTENCE = re.compile(r"[.!?。！？｡؟।॥۔።։។။…]+[\s\"')\]»”」』]*")
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}


def label(documents: Sequence[Document]) -> list[str]:
    """Set domain, education and quality; nothing is dropped."""
    for d in documents:
        part, middle = d.text, len(d.text) // 2
        if len(part) > 2 * READ:  # code begins with prose, and papers with a page of names
            part = part[:READ] + part[middle : middle + READ]
        d.domain = domain(part)
        d.education = education(part, d.domain, d.language)
        d.quality = next(band for band, least in BANDS if d.education >= least)
    return [""] * len(documents)


def domain(text: str) -> str:
    """What a text is about, or how it is written: the first of the domains whose signs it shows."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "prose"
    if sum(map(bool, map(_CODE_LINE.fullmatch, lines))) >= 0.5 * len(lines) and len(lines) > 2:
        return "code"
    turns = sum(map(bool, map(_TURN.match, lines)))
    if turns >= 2 and turns >= 0.4 * len(lines):
        return "conversation"
    lower, words = text.lower(), 1 + len(text.split())
    formulas = len(_FORMULA.findall(text))
    if 2 * formulas + len(_MATHEMATICS.findall(lower)) >= max(2, 0.04 * words):
        return "mathematics"
    return "science" if len(_SCIENCE.findall(lower)) >= max(2, 0.03 * words) else "prose"


def education(text: str, domain: str, language: str = "en") -> float:
    """How much a text looks like one that teaches, in [0, 1].

    The mean of signs that good explanations share (sentences of a readable length, a rich
    vocabulary, long words, words that explain), less frames of web pages and shouting; for code, of
    comments, names and short lines. Where no spaces part words there are no long ones to count.
    """
    spaced = language not in UNSPACED
    words = text.split() if spaced else _PAIR.findall(text)
    if not words:
        return 0.0
    lower = text.lower()
    if domain == "code":
        parts = _code_signs(text)
    else:
        sentences = max(1, len(_SENTENCE.findall(text)))
        variety = len(set(map(str.lower, words))) / len(words) * min(1.0, len(words) / 100)
        scale = WORD_LENGTHS.get(language, ENGLISH) / ENGLISH if spaced else _UNSPACED_SCALE
        parts = [_peak(len(text) / sentences, 60 * scale, 160 * scale), min(1.0, variety / 0.7)]
        if spaced:
            parts.append(min(1.0, sum(len(w) > 6 * scale for w in words) / len(words) / 0.35))
        explains = len(_EXPLAINS.findall(lower)) + len(_FORMULA.findall(text))
        parts.append(min(1.0, explains / len(words) / 0.04))
    frames = len(_BOILERPLATE.findall(lower))
    shouts = text.count("!") + sum(len(w) > 3 and w.isupper() for w in words)
    return max(0.0, sum(parts) / len(parts) - 0.1 * frames - min(0.3, shouts / len(words)))


def _code_signs(text: str) -> list[float]:
    lines = [line for line in text.split("\n") if line.strip()]
    comments = sum(line.lstrip().startswith(("#", "//", "/*", "*", '"""', "--")) for line in lines)
    names = re.findall(r"[A-Za-z_]\w*", text)
    return [
        min(1.0, comments / len(lines) / 0.1),
        min(1.0, sum(len(n) > 3 for n in names) / max(1, len(names)) / 0.6),
        _peak(len(text) / len(lines), 20, 60),
        min(1.0, len(set(names)) / max(1, len(names)) / 0.4),
    ]


def _peak(x: float, low: float, high: float) -> float:
    """1 within [low, high], less and less outside."""
    return min(1.0, x / low, high / x) if x else 0.0


def reject(rules: Rules, documents: Sequence[Document]) -> list[str]:
    """The name of the first rule that each document breaks, "" for none."""
    return [_code(rules, d) if d.domain == "code" else _text(rules, d) for d in documents]


def _code(r: Rules, d: Document) -> str:
    lines = d.text.split("\n")
    letters = sum(map(len, re.findall(r"[^\W_]+", d.text)))
    if r.code_line and len(d.text) > r.code_line[0] * len(lines):
        return "code_line"
    if r.code_line and max(map(len, lines)) > r.code_line[1]:
        return "code_line"
    if r.code_letters and letters < r.code_letters * len(d.text):
        return "code_letters"
    return ""


def _text(r: Rules, d: Document) -> str:
    words = d.text.split()
    lines = [line for line in d.text.split("\n") if line.strip()]
    spaced = d.language not in UNSPACED
    n = len(words) if spaced else sum(map(len, words)) // LETTERS_A_WORD
    if r.min_words and n < r.min_words:
        return "min_words"
    if not words:
        return "min_words"
    if r.max_words and n > r.max_words:
        return "max_words"
    if r.language_probability and d.language_probability < r.language_probability:
        return "language_probability"
    prose = d.domain in ("prose", "science", "conversation")  # formulas have words of their own
    if r.mean_word and spaced and prose:
        low, high = bounds(d.language, *r.mean_word)
        if not low <= sum(map(len, words)) / len(words) <= high:
            return "mean_word"
    symbols = d.text.count("#") + d.text.count("...") + d.text.count("…")
    if r.symbols is not None and symbols > r.symbols * n:
        return "symbols"
    if r.bullets and sum(map(bool, map(_BULLET.match, lines))) > r.bullets * len(lines):
        return "bullets"
    ends = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    if r.ellipses is not None and ends > r.ellipses * len(lines):
        return "ellipses"
    if r.alphabetic and spaced and prose:
        lettered = sum(w[0].isalpha() or any(map(str.isalpha, w)) for w in words)
        if lettered < r.alphabetic * len(words):
            return "alphabetic"
    again = len(lines) - len(set(lines))
    if r.repeated_lines is not None and len(lines) > 3 and again > r.repeated_lines * len(lines):
        return "repeated_lines"
    if r.repeated_pairs and spaced and len(words) >= 20:
        some = words[:1000]
        most = max(Counter(itertools.pairwise(some)).values())
        if most > r.repeated_pairs * (len(some) - 1):
            return "repeated_pairs"
    stop_words = _STOP_WORDS & set(map(str.lower, words[:1000]))
    if r.stop_words and d.language == "en" and prose and len(stop_words) < r.stop_words:
        return "stop_words"
    if r.boilerplate and len(set(_BOILERPLATE.findall(d.text.lower()))) >= r.boilerplate:
        return "boilerplate"
    return ""
