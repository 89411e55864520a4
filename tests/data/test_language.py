import pytest

from q3mega.data.language import identify


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
