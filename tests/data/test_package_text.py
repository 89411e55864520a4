"""The sources hold what they promise; the filters drop exactly what they should."""

import random
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data import package_text
from q3mega.errors import UserError

SCRIPTS = {"Russian": "CYRILLIC", "Chinese": "CJK", "Japanese": "HIRAGANA", "Arabic": "ARABIC"}


@pytest.fixture(scope="module")
def corpus():
    return {name: list(package_text.documents(name)) for name in package_text.sources()}


def test_sources_hold_a_few_megabytes_of_every_kind(corpus):
    size = sum(len(d.encode()) for docs in corpus.values() for d in docs)
    assert 3e6 < size < 10e6
    assert {s.kind for s in package_text.sources().values()} == {"prose", "code", "science"}
    assert all(docs and all(docs) for docs in corpus.values())


def test_documents_are_clean_and_come_in_a_fixed_order(corpus):
    for name in ("year_2889", "django_ja", "python_reference"):
        assert list(package_text.documents(name)) == corpus[name]
    sample = [d for docs in corpus.values() for d in docs[:5]]
    assert [package_text.clean(d) for d in sample] == sample


@pytest.mark.parametrize("language", SCRIPTS)
def test_a_translation_is_in_its_script(corpus, language):
    (source,) = [s for s in package_text.sources().values() if s.language == language]
    letters = [c for d in corpus[source.name] for c in d]
    assert sum(unicodedata.name(c, "").startswith(SCRIPTS[language]) for c in letters) > 1000


def test_the_book_has_its_first_and_last_words_and_no_notices(corpus):
    book = "\n\n".join(corpus["year_2889"])
    assert "Little though they seem to think of it" in book
    assert book.endswith("Jules Verne.")
    assert not re.search("gutenberg|produced by", book, re.IGNORECASE)
    assert len(corpus["year_2889"]) > 10


def test_code_compiles(corpus):
    for document in corpus["stdlib"]:
        compile(document, "document", "exec")


def test_an_unknown_source_is_named():
    with pytest.raises(UserError, match="source='books' is unknown"):
        package_text.documents("books")


def test_a_missing_package_is_named_with_the_remedy():
    with pytest.raises(UserError, match="pip install not-there"):
        package_text._package("not_there", "not-there")


@given(st.text(alphabet=" \t\r\n\0aeé\u0301\u200d\u200b\u2028", max_size=30))
def test_clean_is_idempotent_and_normal(raw):
    done = package_text.clean(raw)
    assert package_text.clean(done) == done
    assert unicodedata.is_normalized("NFC", done)
    assert not re.search(r"[\r\0\u200b]| \n|\n{3}", done)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("all:\n\tcc -o a a.c \t\n", "all:\n\tcc -o a a.c"),  # a recipe of make begins with one
        ("func f() {\n\tx := 1\t// one\n\t\n}\t", "func f() {\n\tx := 1\t// one\n\n}"),
        ("\n\n\tif (a)\n\t\treturn;", "\tif (a)\n\t\treturn;"),
        ("  prose\t \nand more\t", "prose\nand more"),
        ("a\tb\tc\n1\t\t\n\t2\t\n", "a\tb\tc\n1\t\t\n\t2\t"),  # empty cells are cells
        ("a\tb \r\n1\t2\r\n", "a\tb\n1\t2"),
    ],
)
def test_tabs_stay_where_they_mean_something(raw, clean):
    assert package_text.clean(raw) == package_text.clean(clean) == clean


def test_clean_is_linear_in_blanks():  # of quadratic time it would be hours
    assert len(package_text.clean("a" + " " * 10**6 + "b")) == 10**6 + 2


def _words(rng: random.Random, n: int) -> list[str]:
    return [str(rng.randrange(10**6)) for _ in range(n)]


def test_copies_and_near_copies_go_and_the_first_stays():
    rng = random.Random(0)
    base = [_words(rng, 200) for _ in range(50)]
    near = [[*words[:100], "changed", *words[101:]] for words in base]  # Jaccard 191 / 201 = 0.95
    far = [words[:100] + _words(rng, 100) for words in base]  # Jaccard 96 / 296 = 0.32
    docs = [" ".join(words) for words in (*base, *base, *near, *far)]
    kept, dropped = package_text.deduplicate(docs)
    assert kept == docs[:50] + docs[150:]
    assert dropped == 100


def test_texts_without_words_or_spaces_are_told_apart():
    docs = ["+++", "---", "", "東京は今日も雨です。", "大阪は明日から晴れる。"]
    assert package_text.deduplicate(docs) == (docs, 0)


def test_a_threshold_out_of_range_is_named():
    with pytest.raises(UserError, match=r"threshold=0\.2"):
        package_text.deduplicate([], threshold=0.2)


def test_decontamination_finds_thirteen_words_in_a_row():
    rng = random.Random(1)
    question = _words(rng, 30)
    thirteen, twelve = " ".join(question[5:18]), " ".join(question[5:17])
    docs = [f"so {thirteen.replace(' ', ', ')}!", f"so {twelve} no", "else"]
    assert package_text.decontaminate(docs, [" ".join(question)]) == (docs[1:], 1)
    assert package_text.decontaminate(docs, [" ".join(question)], n=12) == (docs[2:], 2)


def test_a_short_evaluation_text_must_occur_whole():
    docs = ["He asked: what is 12+34? Nobody knew.", "What is 12+35?", "what is 12"]
    assert package_text.decontaminate(docs, ["What is 12+34?", ""]) == (docs[1:], 1)
    assert (
        package_text.decontaminate(["请问今天天气怎么样", "天气很好"], ["今天天气怎么样?"])[1] == 1
    )


def test_the_docs_show_every_source():
    docs = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    for s in package_text.sources().values():
        assert f"| {s.name} | {s.language} | {s.kind} | {s.licence} | {s.package} |" in docs
