import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.language import script
from q3mega.data.ngrams import WORD
from q3mega.rewards.instructions.text_units import (
    code_blocks,
    is_question,
    items,
    occurrences,
    prose,
    sentences,
    visible,
    words,
)
from q3mega.rewards.language import written_in


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Don't stop: 3.5 well-known", ["Don't", "stop", "3.5", "well", "known"]),
        ("我爱 tea。これはペン", ["我", "爱", "tea", "こ", "れ", "は", "ペ", "ン"]),
        ("नमस्ते दुनिया!", ["नमस्ते", "दुनिया"]),
        ("می\u200cخواهم، كِتَاب", ["می\u200cخواهم", "كِتَاب"]),
        ("한국어는 좋다", ["한국어는", "좋다"]),
        ("snake_case l’eau 1,000", ["snake", "case", "l’eau", "1,000"]),
        ("_ - ' .", []),
        ("ประเทศไทย", ["ประเ", "ทศไท", "ย"]),
        ("မြန်မာစာ", ["မြန်မာစာ"]),
        ("٣٫٥ كتاب", ["٣٫٥", "كتاب"]),
    ],
)
def test_words(text, found):
    assert words(text) == found


@given(st.text(alphabet="abcäßя我かカ茶ا7 -!。\n"))
def test_words_are_those_of_the_corpus_where_that_has_no_marks_to_cut_at(text):
    assert words(text) == WORD.findall(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('Mr. Fox paid 3.5 dollars, e.g. for tea. He left... and came back. "Why?" No.', 4),
        ("J. K. Rowling wrote it. So did I. Then tea, etc. and more, etc. The end.", 4),
        ("Das kostet z.B. 3.5 Euro. Wirklich?! Ja...", 3),
        ("我喜欢茶。“你呢？”好！", 3),
        ("مرحبا. كيف حالك؟ جيد!", 3),
        ("यह चाय है। वह दूध है॥", 2),
        ("ဒါကလက်ဖက်ရည်။ဒါကနို့။", 2),
        ("Τι είναι αυτό; Είναι τσάι.", 2),
        ("This is tea; that is milk.", 1),
        ("ይህ ሻይ ነው። ያ ወተት ነው፧", 2),
        ("# A title\nText without a stop\n\nMore\n- one\n- two. Three.\n1. Four", 7),
        ("all lower case. it ends anyway.", 2),
        ("See a.b.c and x.y", 1),
        ("```python\nprint('Hi. There. You.')\n```\nDone.", 1),
        ("?! ... 。", 0),
    ],
)
def test_sentences(text, found):
    assert len(sentences(text)) == found, sentences(text)


@given(st.text(alphabet="ab .!?。'\n#-1é"))
def test_sentences_keep_every_word(text):
    text = visible(text)
    kept = [word for sentence in sentences(text) for word in words(sentence)]
    assert [w for w in kept if w != "1"] == [w for w in words(text) if w != "1"]


@pytest.mark.parametrize(
    ("text", "phrase", "times"),
    [
        ("Tea, TEA; steam teas", "tea", 2),
        ("Größe GRÖSSE", "größe", 2),
        ("绿茶和红茶", "茶", 2),
        ("والكتاب كتاب", "كتاب", 2),
        ("강을 건강", "강", 1),
        ("aa aa aa aa", "aa aa", 2),
        ("C++ is not C", "c++", 1),
        ("कि की", "क", 0),
    ],
)
def test_occurrences(text, phrase, times):
    assert occurrences(text, phrase) == times


def test_code_and_prose():
    text = "a\n```py\nx\n```\nb\n```\ny\n```\n```js\nopen"
    assert code_blocks(text) == [("py", "x"), ("", "y")]
    assert prose(text) == "a\nb\nopen"
    assert prose("```py\nx\n```") == "```py\nx\n```"


GERMAN = "Heute geht die Ziege auf die Wiese und frisst dort das grüne Gras. "
ENGLISH = "Today the goat walks to the meadow and eats the green grass there. "


@pytest.mark.parametrize(
    ("text", "code", "found"),
    [
        (GERMAN, "de", None),
        (GERMAN.upper(), "de", None),
        (ENGLISH, "de", "mostly English"),
        (GERMAN * 30 + ENGLISH * 20, "de", "only 60% German"),
        ("Ja.", "de", "too short to tell (2 letters)"),
        ("Чай", "de", "mostly Cyrillic script"),
        ("123 !", "de", "no letters"),
        ("茶", "zh", None),
        ("お茶", "zh", "Japanese"),
        ("お茶", "ja", None),
        ("北京大学", "ja", "Chinese"),
        ("차", "ko", None),
        ("Τσάι", "el", None),
    ],
)
def test_written_in(text, code, found):
    assert written_in(text, code) == found


def test_marks_of_a_script_are_letters_of_it():
    assert {script(c) for c in "茶かカー々"} == {"CJK"}


@pytest.mark.parametrize(
    ("text", "numbered", "bulleted"),
    [
        ("1、苹果\n2、梨", 2, 0),
        ("（1）苹果\n（2）梨", 2, 0),
        ("①りんご\n②なし", 2, 0),
        ("１．りんご\n２．なし", 2, 0),
        ("・りんご\n・なし", 0, 2),
        ("١. تفاح\n٢. كمثرى", 2, 0),
        ("3.5 kg\n-5 degrees\n1、5 and 2", 0, 0),
    ],
)
def test_lists_have_the_marks_of_their_script(text, numbered, bulleted):
    assert (len(items(text, numbered=True)), len(items(text, numbered=False))) == (
        numbered,
        bulleted,
    )


@pytest.mark.parametrize(
    ("sentence", "asks"),
    [
        ("Why?", 1),
        ("为什么？", 1),
        ("لماذا؟", 1),
        ("Γιατί;", 1),
        ("So; yes;", 0),
        ("0;", 0),
        ("Ինչո՞ւ։", 1),
        ("ለምን፧", 1),
    ],
)
def test_questions_of_every_script(sentence, asks):
    assert is_question(sentence) == bool(asks)
