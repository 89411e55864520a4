"""Real text for pre-training that ships inside packages the set-up installs: nothing is downloaded.

`python -m q3mega.data.package_text` prints the table of docs/data.md. What a package
holds is read as text (source files, translation catalogues), never imported.
"""

import ast
import json
import random
import re
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rensa import RMinHash, RMinHashLSH

from q3mega.data.ngrams import WORD, grams
from q3mega.errors import UserError

_LANGUAGES = {
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "pt_BR": "Portuguese",
    "ru": "Russian",
    "zh_Hans": "Chinese",
    "ja": "Japanese",
    "ar": "Arabic",
}
_STDLIB = [
    "argparse", "ast", "bisect", "calendar", "contextlib", "csv", "dataclasses", "datetime",
    "decimal", "difflib", "fractions", "functools", "heapq", "inspect", "ipaddress",
    "json/decoder", "json/encoder", "logging/__init__", "pathlib", "random", "re/_parser",
    "shutil", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading",
    "tokenize", "typing", "unittest/case", "urllib/parse", "zipfile",
]  # fmt: skip
_SYMPY = [
    "core", "functions/elementary", "functions/special", "geometry", "ntheory", "series",
    "stats",
]  # fmt: skip
_NUMPY = ["_core", "fft", "lib", "linalg", "ma", "polynomial"]
_PO = re.compile(r'^(msgid|msgstr) ((?:"(?:[^"\\]|\\.)*"\n)+)', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One body of text. kind: prose, code or science. package: where it ships."""

    name: str
    language: str
    kind: str
    licence: str
    package: str


def sources() -> dict[str, Source]:
    """All sources by name."""
    rows = [
        Source("stdlib", "Python", "code", "PSF-2.0", "Python"),
        Source("stdlib_docs", "English", "prose", "PSF-2.0", "Python"),
        Source("python_reference", "English", "prose", "PSF-2.0", "Python"),
        Source("year_2889", "English", "prose", "public domain", "reasoning-gym"),
        Source("sympy_docs", "English", "science", "BSD-3-Clause", "sympy"),
        Source("numpy_docs", "English", "science", "BSD-3-Clause", "numpy"),
    ] + [
        Source(f"django_{code}", language, "prose", "BSD-3-Clause", "Django")
        for code, language in _LANGUAGES.items()
    ]
    return {row.name: row for row in rows}


def documents(name: str) -> Iterator[str]:
    """The cleaned documents of one source, in a fixed order.

    Raises UserError for an unknown source or a package that is not installed.
    """
    match name:
        case "stdlib":
            texts = _stdlib()
        case "stdlib_docs":
            texts = _docstrings(_stdlib())
        case "python_reference":
            texts = _topics()
        case "year_2889":
            texts = _book()
        case "sympy_docs":
            texts = _docstrings(_modules("sympy", _SYMPY))
        case "numpy_docs":
            texts = _docstrings(_modules("numpy", _NUMPY))
        case _ if name in sources():
            catalogues = translations(name.removeprefix("django_"))
            texts = ("\n".join(map("\n".join, pairs)) for pairs in catalogues)
        case _:
            raise UserError(f"source={name!r} is unknown: use one of {', '.join(sources())}")
    return map(clean, texts)


def _package(module: str, package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"this text ships with {package}, which is missing: pip install {package}")
    return Path(spec.origin).parent


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in _STDLIB:
        path = root / f"{module}.py"
        if path.exists():  # a few modules move between Python releases
            yield path.read_text(encoding="utf-8")


def _modules(package: str, folders: list[str]) -> Iterator[str]:
    root = _package(package, package)
    paths = sorted(p for folder in folders for p in (root / folder).glob("*.py"))
    random.Random(package).shuffle(paths)  # who reads the first ones only reads of everything
    for path in paths:
        yield path.read_text(encoding="utf-8")


def _docstrings(modules: Iterable[str]) -> Iterator[str]:
    """Docstrings of a paragraph or more, which is longer than 150 characters."""
    for source in modules:
        for node in _definitions(ast.parse(source)):
            text = ast.get_docstring(node)
            if text and len(text) > 150:
                yield text


def _definitions(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[Any]:
    """The node and the classes and functions in its body, at any depth."""
    yield node
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef):
            yield from _definitions(inner)


def _topics() -> Iterator[str]:
    """The language reference that Python's help() shows: a module with one literal dict."""
    path = _package("pydoc_data", "Python") / "topics.py"
    literal = next(n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Dict))
    yield from ast.literal_eval(literal).values()


def _book() -> Iterator[str]:
    """Verne's "In the Year 2889" without the publisher's notices, a few paragraphs a document."""
    path = _package("reasoning_gym", "reasoning-gym") / "data/in_the_year_2889.txt"
    book = path.read_text(encoding="utf-8")
    part = ""
    story = book[book.index("\nIN THE YEAR 2889.\n") : book.index("End of Project")]
    for paragraph in story.split("\n\n"):
        part += paragraph + "\n\n"
        if len(part) > 1500:
            yield part
            part = ""
    if part.strip():
        yield part


def translations(code: str) -> Iterator[list[tuple[str, str]]]:
    """(English, translated) sentences of Django's locale `code`, a list a catalogue."""
    root = _package("django", "Django")
    catalogue = f"locale/{code}/LC_MESSAGES/django.po"
    for path in sorted([root / "conf" / catalogue, *root.glob(f"contrib/*/{catalogue}")]):
        pairs, pending = [], ""
        for kind, quoted in _PO.findall(path.read_text(encoding="utf-8")):
            text = "".join(json.loads(line, strict=False) for line in quoted.splitlines())
            if kind == "msgid":
                pending = text
            elif pending and text and "{" not in text and "%" not in text:
                pairs.append((pending.strip(), text.strip()))
        if pairs:
            yield pairs


def clean(text: str) -> str:
    """NFC, no control characters, no trailing blanks, at most one empty line in a row.

    Tabs stay where they mean something: before and between words, and at the ends of a table's
    lines, whose last cells may be empty.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", re.sub(r"[^\n\t -~]", _visible, text))
    lines = [line.rstrip(" ") for line in text.split("\n")]
    if _is_table(lines):
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip(" \t") for line in lines)).strip("\n")
    return (text if text.startswith("\t") else text.lstrip()).rstrip()


def _is_table(lines: Sequence[str]) -> bool:
    """Whether the lines, of which there are two or more, have equally many tabs each, and one has
    some between its words."""
    tabs = [line.count("\t") for line in lines if line]
    between = any("\t" in line.strip() for line in lines)
    return between and len(tabs) > 1 and min(tabs) == max(tabs)


def _visible(match: re.Match[str]) -> str:
    """Any character but control and format ones; the joiners shape Persian, Hindi and emoji."""
    c = match[0]
    return c if c in "\u200c\u200d" or unicodedata.category(c)[0] != "C" else ""


def deduplicate(texts: Iterable[str], threshold: float = 0.8) -> tuple[list[str], int]:
    """(kept, number dropped): of copies, and of near copies, the first stays.

    Near: an estimated Jaccard similarity of word 5-grams of `threshold` or more (MinHash of 128
    permutations, standard error below 0.05). Raises UserError for a threshold outside [0.5, 1],
    because 32 bands of four rows find fewer than 9 in 10 pairs below it.
    """
    if not 0.5 <= threshold <= 1:
        raise UserError(f"threshold={threshold} must lie in [0.5, 1]")
    index = RMinHashLSH(threshold=threshold, num_perm=128, num_bands=32)
    kept: list[str] = []
    sketches: list[RMinHash] = []
    seen: set[str] = set()
    dropped = 0
    for text in texts:
        sketch = RMinHash(num_perm=128, seed=42)
        sketch.update(sorted(grams(text, 5)))
        near = (i for i in index.query(sketch) if sketch.jaccard(sketches[i]) >= threshold)
        if text in seen or next(near, None) is not None:
            dropped += 1
            continue
        index.insert(len(kept), sketch)
        kept.append(text)
        sketches.append(sketch)
        seen.add(text)
    return kept, dropped


def decontaminate(
    texts: Iterable[str], evaluation: Iterable[str], n: int = 13
) -> tuple[list[str], int]:
    """(kept, number dropped): documents that share a word n-gram with an evaluation text go.

    An evaluation text of fewer than n words must occur whole. n = 13 is GPT-3's choice (arXiv
    2005.14165, appendix C).
    """
    forbidden: dict[int, set[str]] = {}
    for text in evaluation:
        size = min(n, len(WORD.findall(text)))
        if size:
            forbidden.setdefault(size, set()).update(grams(text, size))
    kept, dropped = [], 0
    for text in texts:
        if any(grams(text, size) & known for size, known in forbidden.items()):
            dropped += 1
        else:
            kept.append(text)
    return kept, dropped


def main() -> None:
    """Print one row a source: language, kind, licence, package, documents, megabytes."""
    print("| source | language | kind | licence | ships with | documents | MB |")
    print("|---|---|---|---|---|---|---|")
    for s in sources().values():
        sizes = [len(text.encode()) for text in documents(s.name)]
        row = (s.name, s.language, s.kind, s.licence, s.package, len(sizes))
        print("|", *(f"{cell} |" for cell in row), f"{sum(sizes) / 1e6:.2f} |")


if __name__ == "__main__":
    main()
