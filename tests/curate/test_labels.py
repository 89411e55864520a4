"""Labels, the rules that drop a document, and weights by label."""

import random

import numpy as np
import pytest

from q3mega.curate import labels, mixture, word_lengths
from q3mega.curate.config import Rules, Weight
from q3mega.curate.document import Document
from q3mega.data import package_text

PROSE = (
    "The harbour was quiet when the boats came back, and the people of the town walked down to "
    "the water to see what had been caught. Nobody had expected much of the night, because the "
    "wind had turned to the north before the lamps were lit. Yet the nets were full, and the "
    "oldest of the fishermen said that he had never seen anything like it in all the years that "
    "he had been there."
)
CODE = """
def total(rows):
    # one pass over the rows
    count = 0
    for row in rows:
        if row.value > 3:
            count += row.value
    return count


class Table:
    def __init__(self, rows):
        self.rows = list(rows)
"""
MATHEMATICS = (
    "Theorem. Let $f$ be a polynomial with integer coefficients. If $f(p) = 0$ for infinitely many "
    "primes then $f = 0$. Proof. A polynomial of degree n has at most n roots, by induction on n: "
    "divide by x - a, where a is a root, and count the roots of the quotient of degree n - 1."
)
CONVERSATION = """Anna: Did you see where I left the keys to the car?
Ben: On the table, next to the letters that came this morning.
Anna: They are not there any more, and I have to go in a minute.
Ben: Then look into the pocket of the coat that you had on yesterday."""
SCIENCE = (
    "The experiment measured the temperature of the samples while the energy of the particles was "
    "raised. Molecules of oxygen and carbon react, and the observations of the laboratory agree "
    "with the hypothesis: the distribution of velocities follows the theory."
)
SPAM = "BUY NOW!!! CLICK HERE to SIGN UP!!! Best deals!!! " * 12
EXAMPLES = {
    "prose": PROSE,
    "code": CODE,
    "mathematics": MATHEMATICS,
    "conversation": CONVERSATION,
    "science": SCIENCE,
}


def labelled(raw: str, language: str = "en", probability: float = 1.0) -> Document:
    d = Document(package_text.clean(raw), "web", "CC0", language, probability)
    assert labels.label([d]) == [""]
    return d


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_domain_is_told_by_its_signs(name):
    d = labelled(EXAMPLES[name])
    assert d.domain == name
    assert 0 <= d.education <= 1
    assert labels.reject(Rules(min_words=20), [d]) == [""]


def test_real_documents_have_the_domain_of_their_source_more_often_than_not():
    def share(source: str, *wanted: str) -> float:
        domains = [labelled(d).domain for d in package_text.documents(source)]
        return sum(f in wanted for f in domains) / len(domains)

    assert share("stdlib", "code") > 0.5
    assert share("sympy_docs", "mathematics", "science") > 0.5
    assert share("numpy_docs", "mathematics", "science") > 0.5
    assert share("year_2889", "prose") > 0.8


def test_what_explains_scores_above_what_sells():
    assert labelled(MATHEMATICS).education > 0.6 > 0.4 > labelled(SPAM).education
    assert labelled(SPAM).quality == "low"
    assert labelled(MATHEMATICS).quality == "high"
    lettered = " ".join(f"word{i}" for i in range(200))
    assert labelled(PROSE).education > labelled(lettered).education


DROPPED = {
    "min_words": "Too short to be of any use.",
    "max_words": PROSE * 40,
    "mean_word": " ".join(f"{w} {w}interdependencies" for w in PROSE.split()),
    "symbols": PROSE.replace(" ", " #", 20),
    "bullets": "\n".join(f"- {line}" for line in PROSE.split(". ")),
    "ellipses": "\n".join(f"{line}..." for line in PROSE.split(". ")) + PROSE[:200] * 3,
    "alphabetic": PROSE.replace(" ", " -- ", 60),
    "repeated_lines": (PROSE[:80] + "\n") * 6 + PROSE,
    "repeated_pairs": PROSE + " and then" * 60,
    "stop_words": " ".join(w for w in PROSE.split() if w.lower() not in labels._STOP_WORDS),
    "boilerplate": f"{PROSE} All rights reserved. Privacy policy. Terms of use.",
    "code_line": CODE + "x = " + "1 + " * 400 + "1\n",
    "code_letters": CODE + "[[" + "(-1), [" * 12 + "\n" + ("((((((((((((((((((((();\n" * 20),
}


@pytest.mark.parametrize("rule", DROPPED)
def test_each_rule_drops_what_it_is_for_and_can_be_turned_off(rule):
    d = labelled(DROPPED[rule])
    rules = Rules(max_words=2000)
    assert labels.reject(rules, [d]) == [rule]
    assert labels.reject(rules.model_copy(update={rule: None}), [d]) == [""]


def test_a_language_that_is_not_sure_is_dropped_but_for_code():
    unsure = [labelled(PROSE, "xx", 0.2), labelled(CODE, "xx", 0.2)]
    assert labels.reject(Rules(min_words=20), unsure) == ["language_probability", ""]


def test_text_without_spaces_is_counted_by_letters():
    chinese = "机器学习是人工智能的一个分支，它研究计算机怎样模拟人类的学习行为。" * 4
    assert labels.reject(Rules(), [labelled(chinese, "zh")]) == [""]
    assert labels.reject(Rules(), [labelled(chinese[:40], "zh")]) == ["min_words"]


def draw(factors: list[Weight], n: int, heldout: float = 0.0, **of: str) -> list[Document]:
    some = [Document("t", "web", "l", identity=i, **of) for i in range(n)]
    mixture.draw(factors, 7, heldout, some)
    return some


def test_a_weight_is_the_product_of_the_factors_that_match():
    factors = [
        Weight(domain="code", weight=1.5),
        Weight(domain="code", quality="high", weight=2),
        Weight(language="de", weight=0.1),
        Weight(source="web", weight=1.1),
        Weight(source="other", weight=50),
    ]
    d = Document("t", "web", "l", "de", domain="code", quality="high")
    assert mixture.weight(factors, d) == pytest.approx(1.5 * 2 * 0.1 * 1.1)
    d.quality = "low"
    assert mixture.weight(factors, d) == pytest.approx(1.5 * 0.1 * 1.1)
    assert mixture.weight([], d) == 1


def test_copies_have_the_weight_as_their_mean_and_differ_by_one_at_most():
    copies = [d.copies for d in draw([Weight(domain="code", weight=2.3)], 4000, domain="code")]
    assert set(copies) == {2, 3}
    assert np.mean(copies) == pytest.approx(2.3, abs=4 * 0.46 / 4000**0.5)
    assert {d.copies for d in draw([], 100)} == {1}


def test_a_document_is_drawn_by_its_hash_alone():
    factors = [Weight(weight=0.5)]
    one = {d.identity: (d.copies, d.heldout) for d in draw(factors, 300, 0.2)}
    some = [Document("t", "web", "l", identity=i) for i in range(299, -1, -1)]
    random.Random(0).shuffle(some)
    reasons = mixture.draw(factors, 7, 0.2, some)
    assert {d.identity: (d.copies, d.heldout) for d in some} == one
    assert [not d.copies for d in some] == [r == "weight" for r in reasons]
    other = mixture.draw(factors, 8, 0.2, some)
    assert other != reasons


def test_a_held_out_text_is_kept_once():
    some = draw([Weight(weight=3)], 4000, 0.1)
    held = [d for d in some if d.heldout]
    assert len(held) == pytest.approx(400, abs=4 * 19)
    assert {d.copies for d in held} == {1}
    assert {d.copies for d in some if not d.heldout} == {3}


@pytest.mark.parametrize("code", ["ko", "vi", "fi", "ml", "ja", "zh_Hans", "ar", "hi", "ru"])
def test_the_same_sentences_pass_and_score_alike_in_every_language(code):
    pairs = [
        p
        for catalogue in package_text.translations(code)
        for p in catalogue
        if len(p[0].split()) > 4
    ]
    d = labelled(" ".join(dict.fromkeys(there for _, there in pairs)), code.split("_")[0])
    assert labels.reject(Rules(), [d]) == [""]
    assert 0.45 < d.education < 0.75


@pytest.mark.parametrize("code", ["de", "ko", "vi", "ru"])
def test_the_table_of_words_is_that_of_djangos_translations(code):
    assert word_lengths.measure(code) == pytest.approx(word_lengths.WORD_LENGTHS[code], rel=0.1)


def test_bounds_only_widen():
    assert word_lengths.bounds("en", 3, 10) == (3, 10)
    low, high = word_lengths.bounds("ko", 3, 10)
    assert low < 2.5 and high == 10
    assert word_lengths.bounds("xx", 3, 10)[0] <= low
    assert labels.reject(Rules(), [labelled("오 " * 200, "ko")]) == ["mean_word"]
