"""Hashed words and n-grams against strings."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.ngrams import WORD, Words, fold, grams

TEXTS = st.lists(
    st.text("ab1 ,.\n-_Ééßﬁ东京カ・ক্ষहिไทยี々한글Ａ①\U0001d7d9", max_size=40), max_size=6
)


def _slow(text: str, n: int) -> list[str]:
    words = WORD.findall(fold(text))
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


@given(TEXTS, st.integers(1, 4))
def test_hashes_are_equal_where_the_strings_are(texts, n):
    hashes, offsets = Words(texts).grams(n)
    slow = [_slow(text, n) for text in texts]
    assert np.diff(offsets).tolist() == [len(g) for g in slow]
    flat = [g for each in slow for g in each]
    assert len(set(zip(hashes.tolist(), flat, strict=True))) == len(set(flat)) == len(set(hashes))


def test_a_whole_text_is_the_gram_that_a_longer_one_holds():
    words = Words(["the quick brown fox", "see: The quick, brown fox!"])
    assert words.whole(0) in words.grams(4)[0][1:]
    assert words.whole(0) != Words(["quick the brown fox"]).whole(0)


def test_a_word_of_any_length_is_one_word():
    long = "x" * 200_000
    words = Words([long, long + "y", f"a {long}"])
    assert words.offsets.tolist() == [0, 1, 2, 4]
    assert words.hashes[0] == words.hashes[3] != words.hashes[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is THIS?", "what is this"),
        ("a **bold** _word_", "a bold word"),
        ("Ｆｕｌｌ　ｗｉｄｔｈ １２", "full width 12"),
        ("“curly” — quotes…", '"curly" - quotes...'),
        ("eﬃcient straße", "efficient STRASSE"),
        ("line\nends\t\u00a0here", "line ends here"),
    ],
)
def test_another_setting_of_a_text_has_the_same_words(one, other):
    assert Words([one]).hashes.tolist() == Words([other]).hashes.tolist()
    assert len(Words([one]).hashes) == len(re.findall(r"\w+", other))


def test_grams_of_strings():
    assert grams("A b, c", 2) == {"a b", "b c"}
    assert grams("A b, c", 5) == {"a b c"}
    assert grams("+++", 5) == {"+++"}
    assert grams("东京 x", 1) == {"东", "京", "x"}
