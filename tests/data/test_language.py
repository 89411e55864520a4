import pytest

from q3mega.data.language import identify, prose, script, scripts


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "The quick brown fox jumps over the lazy dog near the river bank."),
        ("de", "Der schnelle braune Fuchs springt über den faulen Hund am Flussufer."),
        ("fr", "Le renard brun saute par-dessus le chien paresseux près de la rivière."),
        ("ru", "Быстрая коричневая лиса прыгает через ленивую собаку у реки."),
        ("zh", "敏捷的棕色狐狸跳过了河边那只懒惰的狗。"),
        ("ar", "الثعلب البني السريع يقفز فوق الكلب الكسول قرب النهر."),
    ],
)
def test_plain_sentences_are_told_apart(code, text):
    found, probability = identify(text)
    assert found == code and 0.5 < probability <= 1


@pytest.mark.parametrize("text", ["", "123 456", "\ud800", "\0" * 50, "!?"])
def test_what_is_no_language_has_a_low_probability(text):
    assert identify(text)[1] < 0.5


def test_only_the_beginning_is_read():
    english = "The committee will meet again on Thursday. " * 40
    assert identify(english) == identify(english + "Der Ausschuss tagt am Donnerstag. " * 400)


@pytest.mark.parametrize(
    ("letters", "name"),
    [
        ("aßﬁＡªⁿ", "LATIN"),
        ("πΩ", "GREEK"),
        ("我々かカｶーㄅ", "CJK"),
        ("한ㅎﾡ", "HANGUL"),
        ("ℝℓℵ𝑥𝛼𝟙µ𞸀", ""),
    ],
)
def test_letters_have_the_script_that_they_stand_for(letters, name):
    assert {script(letter) for letter in letters} == {name}


def test_vowel_signs_cut_no_word():
    assert scripts("हिन्दी में लिखा है") == {"DEVANAGARI": 4}
    assert scripts("مُحَمَّد কি") == {"ARABIC": 1, "BENGALI": 1}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (r"设 x=2，则 $\alpha+\text{cm}$ 为 \(y\)。", "设 =2，则 为 。"),
        ("长 5 cm，sin x 与 log y，共 3kg。", "长 5 ， 与 ，共 3 。"),
        ("见 https://a.b/cde。好", "见 。好"),
        ("so `x_y` and\n```python\nprint(1)\n```\nend", "so and end"),
        ("I read a book", "read book"),
        ("$ costs and no formula", "$ costs and no formula"),
    ],
)
def test_prose_is_what_a_language_says(text, left):
    assert " ".join(prose(text).split()) == left
