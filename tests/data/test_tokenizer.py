"""The trained tokenizer: lossless, stable on arithmetic, and the same through transformers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.chat import render
from q3mega.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from q3mega.errors import UserError

TEXT = ["the cat sat on the mat and the dog sang to the cat", "What is 12+34=46?\n" * 3, "größer 你好 мир"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, 300, path)
    return Tokenizer(path)


@given(text=st.text(max_size=60))
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_the_last_ids(tokenizer):
    assert tokenizer.vocab_size == 300
    assert [tokenizer.id(t) for t in SPECIAL_TOKENS] == list(range(291, 300))
    assert tokenizer.encode("a<think>b")[1] == tokenizer.think_open


def test_digits_and_signs_stand_alone(tokenizer):
    ids = tokenizer.encode("12+34=46")
    assert [tokenizer.decode([i]) for i in ids] == list("12+34=46")


def test_transformers_reads_the_same_folder(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path)
    messages = [{"role": "user", "content": "the cat /think"}, {"role": "assistant", "content": "46"}]
    text = render(messages, add_generation_prompt=True, enable_thinking=False)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False) == text
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos, tokenizer.eod)


def test_training_is_deterministic(tokenizer, tmp_path):
    train_tokenizer(TEXT, 300, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer.path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("size", "word"), [(100, "at least"), (5000, "more than the text gives")])
def test_an_impossible_size_is_named(tmp_path, size, word):
    with pytest.raises(UserError, match=f"vocab_size={size}.*{word}"):
        train_tokenizer(TEXT, size, tmp_path)
