"""Real text for pre-training that ships inside packages the set-up installs: nothing is downloaded.

`python -m q3mega.data.text` prints the table of docs/data.md. What a package holds is read as
text (source files, translation catalogues), never imported.
"""

import ast
import json
import re
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

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
_PO = re.compile(r'^(msgid|msgstr) ((?:"(?:[^"\\]|\\.)*"\n)+)', re.MULTILINE)
_STDLIB = "argparse ast bisect calendar contextlib csv dataclasses datetime decimal difflib fractions " \
    "functools heapq inspect ipaddress json/decoder json/encoder logging/__init__ pathlib random " \
    "re/_parser shutil statistics string subprocess tarfile textwrap threading tokenize typing " \
    "unittest/case urllib/parse zipfile"  # fmt: skip

_SYMPY = ("core", "functions/elementary", "functions/special", "geometry", "ntheory", "series", "stats")


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
        Source("sympy_docs", "English", "science", "BSD-3-Clause", "sympy"),
        Source("year_2889", "English", "prose", "public domain", "reasoning-gym"),
        *(
            Source(f"django_{code}", language, "prose", "BSD-3-Clause", "Django")
            for code, language in _LANGUAGES.items()
        ),
    ]
    return {row.name: row for row in rows}


def documents(name: str) -> Iterator[str]:
    """The cleaned documents of one source, in a fixed order.

    Raises UserError for an unknown source or a package that is not installed.
    """
    if name not in sources():
        raise UserError(f"source={name!r} is unknown: use one of {', '.join(sources())}")
    if name == "stdlib":
        yield from (clean(text) for text in _stdlib())
    elif name == "stdlib_docs":
        yield from (d for text in _stdlib() for d in _docstrings(text))
    elif name == "sympy_docs":
        root = _package("sympy", "sympy")
        for path in sorted(p for part in _SYMPY for p in (root / part).glob("*.py")):
            yield from _docstrings(path.read_text(encoding="utf-8"))
    elif name == "year_2889":
        book = (_package("reasoning_gym", "reasoning-gym") / "data/in_the_year_2889.txt").read_text("utf-8")
        start, end = book.index("*** START"), book.index("*** END")
        body = clean(book[book.index("\n", start) : end])
        yield from re.split(r"\n\n+(?=.{300})", body)
    else:
        yield from _translations(name.removeprefix("django_"))


def _package(module: str, package: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"text source needs package {package!r}, which is missing: pip install {package}")
    return Path(spec.origin).parent


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in _STDLIB.split():
        path = root / f"{module}.py"
        if path.exists():  # a few modules move between Python releases
            yield path.read_text(encoding="utf-8")


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 150:
                yield clean(text)


def _translations(code: str) -> Iterator[str]:
    """English and translated sentences, pair by pair: one document a catalogue."""
    root = _package("django", "Django")
    for path in sorted(root.rglob(f"locale/{code}/LC_MESSAGES/django.po")):
        lines, pending = [], ""
        for kind, quoted in _PO.findall(path.read_text(encoding="utf-8")):
            text = "".join(json.loads(line, strict=False) for line in quoted.splitlines())
            if kind == "msgid":
                pending = text
            elif pending and text and "{" not in text and "%" not in text:
                lines.append(f"{pending.strip()}\n{text.strip()}")
        if lines:
            yield clean("\n".join(lines))


def clean(text: str) -> str:
    """NFC, no control characters, no trailing blanks, at most one empty line in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\t", "    "))
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c)[0] != "C")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip()


def deduplicate(texts: Iterable[str], threshold: float = 0.8) -> tuple[list[str], int]:
    """(kept, number dropped): exact copies, and near copies by MinHash over word 5-grams."""
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=threshold, num_perm=128, num_bands=16)
    kept: list[str] = []
    seen: set[int] = set()
    hashes = []
    dropped = 0
    for text in texts:
        words = text.split()
        grams = [" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))]
        sketch = RMinHash(num_perm=128, seed=42)
        sketch.update(grams)
        near = any(sketch.jaccard(hashes[i]) >= threshold for i in index.query(sketch))
        if hash(text) in seen or near:
            dropped += 1
            continue
        index.insert(len(kept), sketch)
        hashes.append(sketch)
        seen.add(hash(text))
        kept.append(text)
    return kept, dropped


def decontaminate(texts: Iterable[str], evaluation: Iterable[str], n: int = 13) -> tuple[list[str], int]:
    """(kept, number dropped): documents that share a word n-gram with an evaluation text."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    forbidden = set().union(*(grams(text) for text in evaluation))
    texts = list(texts)
    kept = [text for text in texts if not grams(text) & forbidden]
    return kept, len(texts) - len(kept)


def main() -> None:
    """Print one row a source: language, kind, licence, package, documents, megabytes."""
    print("| source | language | kind | licence | ships with | documents | MB |\n|---|---|---|---|---|---|---|")
    for s in sources().values():
        texts = list(documents(s.name))
        size = sum(len(t.encode()) for t in texts) / 1e6
        print(f"| {s.name} | {s.language} | {s.kind} | {s.licence} | {s.package} | {len(texts)} | {size:.2f} |")


if __name__ == "__main__":
    main()
