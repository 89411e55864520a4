r"""How an answer is written: LaTeX and East Asian text put into one form.

Only strings are moved about here: nothing is evaluated, so untrusted text may be read in process.
"""

import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 200  # a longer "answer" is not one, and would only cost the parser time

CJK = r"\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
_EAST_ASIAN = re.compile(f"[{CJK}\u3000-\u303f\uff01-\uff0f\uff1a-\uff5e\uffe5]")
_WIDE_DIGITS = {0xFF10 + digit: str(digit) for digit in range(10)}

# One sign each. What follows a command keeps its distance from it.
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
    "varsigma sigma tau upsilon phi chi psi omega"
)
_SIGNS = str.maketrans(
    {chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F) if wide not in _WIDE_DIGITS}
    | {0xFF3C: 0xFF3C}  # a full-width backslash starts no command
    | {0x3B1 + i: rf"\{name} " for i, name in enumerate(_GREEK.split())}
    | dict.fromkeys("−–—‐‑‒―～〜", "-")
    | dict.fromkeys("，、", ", ")
    | dict.fromkeys("·⋅∙•・", r"\cdot ")
    | dict.fromkeys("≤≦⩽", r"\le ")
    | dict.fromkeys("≥≧⩾", r"\ge ")
    | {c: rf"\mathbb{{{letter}}}" for c, letter in zip("ℝℤℕℚℂ", "RZNQC", strict=True)}
    | {
        "×": r"\times ", "✕": r"\times ", "÷": "/", "∕": "/", "⁄": "/", "∞": r"\infty ",
        "√": r"\sqrt ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "∉": r"\notin ", "∅": r"\emptyset ", "∧": r"\wedge ", "∨": r"\vee ",
        "∖": r"\setminus ", "∠": r"\angle ", "⊥": r"\perp ", "∥": r"\parallel ", "△": r"\triangle ",
        "\u0394": r"\Delta ", "\u2206": r"\Delta ", "\u03a9": r"\Omega ", "\u2126": r"\Omega ",
        "\u00b5": r"\mu ", "→": r"\to ", "∣": "|", "′": "'", "″": "''",
        "°": r"^\circ", "℃": r"^\circ C", "℉": r"^\circ F", "∶": ":", "￥": "¥", "￡": "£",
        "ϕ": r"\phi ", "【": "(", "】": ")", "〔": "(", "〕": ")", "〈": "(", "〉": ")",
    }
)  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_DIGRAPHS = {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "{,}": ",", "**": "^"}

# Commands that print the same sign, or none.
_COMMANDS = {
    alias: sign
    for sign, aliases in {
        "": r"\left \right \middle \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr "
        r"\Biggl \Biggr \displaystyle \textstyle \scriptstyle \limits \therefore \mathstrut \!",
        " ": r"\quad \qquad \enspace \thinspace \space \, \; \: \ ",
        r"\le": r"\leq \leqslant \leqq", r"\ge": r"\geq \geqslant \geqq", r"\ne": r"\neq",
        "<": r"\lt", ">": r"\gt", "|": r"\lvert \rvert \vert \mid", r"\|": r"\lVert \rVert \Vert",
        r"\emptyset": r"\varnothing", r"\frac": r"\dfrac \tfrac \cfrac", "*": r"\ast",
        ":": r"\colon", r"\wedge": r"\land", r"\vee": r"\lor", "/": r"\div",
        r"\setminus": r"\backslash \smallsetminus", r"^\circ": r"\degree \textdegree",
        r"\phi": r"\varphi", r"\epsilon": r"\varepsilon", r"\theta": r"\vartheta",
        r"\{": r"\lbrace", r"\}": r"\rbrace", "[": r"\lbrack", "]": r"\rbrack", "'": r"\prime",
        r"\tan": r"\tg", r"\cot": r"\ctg", r"\arctan": r"\arctg", r"\to": r"\rightarrow",
        r"\in": r"\isin", r"\infty": r"\infin", r"\cdot": r"\bullet", r"\ldots": r"\dots \cdots",
        r"\mathbb{R}": r"\R", r"\mathbb{Z}": r"\Z", r"\mathbb{N}": r"\N", r"\mathbb{Q}": r"\Q",
        "%": r"\%", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "¥": r"\yen",
    }.items()
    for alias in aliases.split(" ") if alias
} | {"\\ ": " "}  # fmt: skip
_COMMAND = re.compile(r"\\(?:left|right) *\.|\\(?:[a-zA-Z]+|.)")

_PLAIN_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|csc|ln|log"
_FUNCTIONS = rf"{_PLAIN_FUNCTIONS}|sec|exp|gcd|lcm|max|min"
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_FORMS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))|(?<=,)\\!(?=[0-9])", ""),  # 1\,000, 1,\!000
    (_COMMAND.pattern, lambda m: _COMMANDS.get(m[0], "" if m[0][-1] == "." else m[0])),
    (r"~", " "),
    (r", +(?=[0-9]{3}(?![0-9]))", ";"),  # "1, 234" is two numbers, 1,234 is one
    (rf"\\(?:mathrm|operatorname\*?|text) *\{{ *({_FUNCTIONS}) *\}}", r"\\\1 "),
    # As plain text has it; not sec, min, max and exp, which are words too.
    (rf"(?<![A-Za-z\\{{])({_PLAIN_FUNCTIONS})(?=[ (^_0-9\\])", r"\\\1"),
    (r"(?<![A-Za-z\\{])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![A-Za-z\\])sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\^ *\(([^()]*)\)", r"^{\1}"),
    (r"\\mathbf *\{ *([RZNQ]) *\}", r"\\mathbb{\1}"),
    (r"\\mathrm *\{ *([ei]) *\}|\\mathbf *\{ *([a-zA-Z]) *\}", lambda m: _bare(m)),
    (
        rf"\\(?:vec|overrightarrow|boldsymbol|bm|pmb|underline|mathop) *(?:{_GROUP}|([a-zA-Z]))",
        lambda m: _bare(m),
    ),
    (
        r"\\(?:math(?:rm|bf|it|sf|tt)|text(?:bf|it|rm|sf|tt|normal)|[mh]box|emph|operatorname) *\{",
        r"\\text{",
    ),
    (r"\{ *\\(?:rm|bf|it) +([^{}]*)\}", r"\\text{\1}"),
    (r"\\text\{ *([^{}]*?) *\}", r"\\text{\1}"),
    (r"\^ *\{ *\\circ *\}|\^ *\\circ(?![a-zA-Z])", r"^\\circ"),
    (r"\\frac *([0-9a-zA-Z]|\\pi(?![a-zA-Z]))", r"\\frac{\1}"),
    (rf"(\\frac{_GROUP}) *([0-9a-zA-Z]|\\pi(?![a-zA-Z]))", r"\1{\3}"),
    (r"\\sqrt *(\[[^\[\]]*\])? *([0-9a-zA-Z]|\\pi(?![a-zA-Z]))", r"\\sqrt\1{\2}"),
    (r"\^ *([0-9]{2,}|-[0-9a-zA-Z])(?![0-9])", r"^{\1}"),  # x^10 of plain text
    (r"([_^]) *\{ *([0-9a-zA-Z]) *\}", r"\1\2"),
    (r"(\\[a-zA-Z]+) +(?=[0-9])", r"\1"),
    (r"\\mathbb *([A-Z])", r"\\mathbb{\1}"),
    (r"(\\in) *([RZNQ])(?![a-zA-Z])", r"\1\\mathbb{\2}"),
    (r"(?<![0-9A-Za-z})]) +| +(?![0-9A-Za-z])", ""),  # but "1 2" is not 12
    (r"[, ]*\(([a-z]\\in[^()]*)\)$", r",\1"),  # x=2k\pi (k\in\mathbb{Z})
    (r"(?<![0-9a-zA-Z}])\+\\infty", r"\\infty"),
    (r"\(-\\infty,\\infty\)", r"\\mathbb{R}"),
    (r"(\^\\circ) *(?:\\text\{([CF])\}|([CF])(?![a-zA-Z]))", r"\1\2\3"),
    (r"([0-9])\\text\{([万亿萬億])", r"\1\2\\text{"),
    (r"\\text\{\}", ""),
    (r"^\\text\{([^{}]*)\}[.,]?$", r"\1"),
]  # fmt: skip
_COMPILED = [(re.compile(pattern), form) for pattern, form in _FORMS]
_PERIOD = re.compile(
    r"(?<=\.)([0-9]*)(?:\\(?:dot|bar|overline) *\{?([0-9]+)\}?([0-9]*)(?:\\dot *\{?([0-9])\}?)?"
    r"|\(([0-9]+)\)(?![0-9(]))"
)
# 3万, 1.5亿, 2亿3000万, 3万5000. A thousand is one only where no metre, gram or watt follows.
_MYRIADS = re.compile(
    r"(?<![0-9.,])(?:([0-9]{1,30}(?:\.[0-9]{1,30})?)[亿億])?(?:([0-9]{1,30}(?:\.[0-9]{1,30})?)[万萬](?!分之))?"
    r"(?:([0-9]{1,30}(?:\.[0-9]{1,30})?)千(?![米克瓦卡焦帕赫伏升吨]))?([0-9]{0,30})"
)
_NAMED = {
    name: sign
    for sign, names in {
        r"\mathbb{R}": "all real numbers;all reals;the set of all real numbers;实数集;全体实数"
        ";任意实数;一切实数;所有实数;すべての実数;実数全体",
        r"\emptyset": "empty set;the empty set;空集;空集合",
    }.items()
    for name in names.split(";")
}
_QUOTES = '“”"「」『』《》'


def normal(text: str, *, wide_digits: bool = False) -> str:
    r"""One form for one notation: \dfrac12, \frac{1}{2} and $\frac 1 2$ read the same.

    wide_digits: full-width ones are digits although nothing else in text is East Asian.
    """
    if wide_digits or _EAST_ASIAN.search(text):
        text = text.translate(_WIDE_DIGITS)
    text = re.sub(r"^\s*([A-ZＡ-Ｚ])、(?!\s*[A-ZＡ-Ｚ](?:、|\s*$))", r"\1. ", text)  # an option
    text = " ".join(text.translate(_SIGNS).split())
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) * 2:
            text = text[len(opening) : -len(closing)]
    for signs, latex in _DIGRAPHS.items():
        text = text.replace(signs, latex)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₉]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    for pattern, form in _COMPILED:
        text = pattern.sub(form, text)
    text = _PERIOD.sub(_overlined, text)
    if any(myriad in text for myriad in "万萬亿億千"):
        text = _MYRIADS.sub(_multiplied, text)
    text = re.sub(r"^=|(?:です)?(?:[.,。]|\\\\)*$", "", text.strip(" ")).strip(_QUOTES + " ")
    return _NAMED.get(text.lower(), text)


def words(text: str) -> str:
    r"""text without \text{} around its pieces."""
    return re.sub(rf"\\text{_GROUP}", r"\1", text)


def _bare(dressed: re.Match[str]) -> str:
    r"""What a command such as \vec{} dresses, apart from a command that stands before it."""
    inside = next(filter(None, dressed.groups()), "").strip()
    before = dressed.string[: dressed.start()]
    return f" {inside}" if re.search(r"\\[a-zA-Z]+$", before) else inside


def _overlined(digits: re.Match[str]) -> str:
    r"""0.\dot{1}4285\dot{7}, 0.\bar{3} and 0.(3), each as 0.\overline{3} is written."""
    fixed, first, between, last, bracketed = digits.groups(default="")
    if bracketed:
        return rf"{fixed}\overline{{{bracketed}}}"
    if between and not last:
        return digits[0]  # digits behind the period are no number
    return rf"{fixed}\overline{{{first}{between}{last}}}"


def _multiplied(digits: re.Match[str]) -> str:
    parts = digits.groups()
    if not any(parts[:3]):
        return digits[0]
    scales = (10**8, 10**4, 10**3, 1)
    value = sum(Fraction(n) * scale for n, scale in zip(parts, scales, strict=True) if n)
    return str(value) if value.denominator == 1 else digits[0]
