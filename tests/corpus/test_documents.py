"""Pre-training documents and their mixture."""

import itertools
from typing import get_args

import pytest

from q3mega import device  # noqa: F401

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDataset

from q3mega.config.pretraining import DocumentKind
from q3mega.corpus import documents
from q3mega.data.tokenizer import Tokenizer, train_tokenizer

MIXTURE = {"facts": 0.5, "worked": 0.3, "direct": 0.2}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = [t for k in MIXTURE for t in itertools.islice(documents.documents(k, 0), 100)]
    train_tokenizer(texts, 300, folder)
    tokenizer = Tokenizer(folder)
    documents.build(MIXTURE, 20 * 1000, 64, tokenizer, 0, folder)
    return folder, tokenizer


def test_a_step_is_a_function_of_its_number(built):
    folder, _ = built
    first, second = (documents.Mixture(MIXTURE, folder, 20, 1000, seed=1) for _ in range(2))
    list(map(first, range(1, 11)))
    assert [s.tokens for s in first(11)] == [s.tokens for s in second(11)]
    assert [s.tokens for s in first(11)] != [s.tokens for s in first(12)]


def test_steps_have_their_size_and_kinds_their_share(built):
    folder, tokenizer = built
    mixture = documents.Mixture(MIXTURE, folder, 20, 1000, seed=1)
    sizes = [sum(map(len, mixture(step))) for step in range(1, 21)]
    assert all(abs(size - 1000) < 2 * 64 for size in sizes)
    texts = [tokenizer.decode(s.tokens) for step in range(1, 21) for s in mixture(step)]
    facts = sum(len(tokenizer.encode(t)) for t in texts if t.count("\n") > 4 and "What" not in t)
    assert facts / sum(sizes) == pytest.approx(0.5, abs=0.1)
    assert max(len(s) for step in range(1, 21) for s in mixture(step)) <= 64


@pytest.mark.parametrize("kind", [*documents.TEXTS, *documents.KINDS])
def test_documents_are_the_same_for_the_same_seed(kind):
    one, two, other = (
        list(itertools.islice(documents.documents(kind, seed), 20)) for seed in (1, 1, 2)
    )
    assert one == two
    assert one != other


def test_held_out_text_is_not_trained_on():
    for kind in documents.TEXTS:
        assert not set(documents.real_text(kind)) & set(documents.real_text(kind, heldout=True))


def test_a_document_has_one_pass_key_and_asks_for_it_again_and_again():
    for text in itertools.islice(documents.documents("retrieval", 0), 50):
        keys = [line for line in text.split("\n") if "code @" in line]
        assert len(keys) == 9 and len(set(keys)) == 1


def test_a_recipe_may_name_the_kinds_that_there_are():
    assert sorted(get_args(DocumentKind)) == sorted(
        [*documents.TEXTS, *documents.KINDS, "retrieval_long"]
    )


def test_a_document_with_a_held_out_question_is_dropped_and_counted(built, tmp_path):
    _, tokenizer = built
    drawn = list(itertools.islice(documents.documents("worked", 0), 64))
    question = drawn[3].split("\n")[0]
    held = sum(question in text for text in drawn)
    sizes = []
    for held_out in ([], [question]):
        books = documents.build({"worked": 1.0}, 100, 64, tokenizer, 0, tmp_path, held_out)
        sizes.append(books.steps["worked: drawn"] - books.drops["worked: a held-out question"])
        stored = IndexedDataset(str(tmp_path / "worked"))
        texts = [tokenizer.decode(stored[i].tolist()) for i in range(len(stored))]
        assert any(question in text for text in texts) == (not held_out)
    assert sizes == [64, 64 - held] and books.drops == {"worked: a held-out question": held}
    assert books.steps["worked: without a held-out question"] == 64 - held


def test_real_text_says_what_it_left_out(built, tmp_path):
    _, tokenizer = built
    books = documents.build({"prose": 1.0}, 500, 64, tokenizer, 0, tmp_path)
    read, distinct, kept = (
        books.steps[f"prose: {step}"] for step in ("read", "no copy, nor near one", "no question")
    )
    assert read > distinct >= kept > 0
    assert books.drops["prose: copy or near copy"] == read - distinct
